"""Runs of variants: resumed to the bit, verified, exported; a run of an earlier version still resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.runs import digest, events, interrupt_after, tiny_run

from lorafit.config.load import load_config
from lorafit.config.schema import keys_that_change_results, with_defaults
from lorafit.errors import ConfigError
from lorafit.model.saved_adapter import read_spec
from lorafit.training.run import resume_run

MIX = {
    "dora": ["lora.dora=true", "lora.b_rate=4", "lora.ranks={q_proj: 2}", "lora.alphas={v_proj: 3}"],
    "pissa": ["lora.init=pissa", "train.neftune=5", "lora.dropout=0.1", "train.weight_decay=0.1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dora", "pissa"])
def test_a_resumed_run_ends_with_the_same_bytes(
    name: str, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*tiny, "train.max_steps=4", "train.save_every=2", "train.eval_every=2", *MIX[name]]
    whole = tiny_run(settings, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        assert not tiny_run(settings, tmp_path / "run").finished
    assert digest(resume_run(tmp_path / "run", quiet=True)) == digest(whole)
    spec = read_spec(whole.adapter)
    assert (spec.variant, spec.rank) == (("dora", 4) if name == "dora" else ("lora", 8))
    plain = tiny_run([*tiny, "train.max_steps=4", "train.eval_every=2"], tmp_path / "plain")
    assert events(plain, "step")[0]["loss"] != 0
    assert digest(plain) != digest(whole)


@pytest.mark.slow
def test_the_proof_of_a_run_with_a_start_passes_on_the_plain_base(tiny: list[str], tmp_path: Path) -> None:
    settings = ["lora.init=olora", "model.quantize=int8", "train.max_steps=3", "run.verify=true"]
    run = tiny_run([*tiny, *settings], tmp_path / "run")
    proof = json.loads((run.path / "proof.json").read_text())
    verdicts = {check["name"]: check["verdict"] for check in proof["checks"]}
    assert (verdicts["changed"], verdicts["reload"]) == ("pass", "pass")


def test_a_stored_config_of_an_earlier_version_has_the_defaults_of_later_keys(tiny: list[str]) -> None:
    config = keys_that_change_results(load_config(None, tiny))
    stored = {key: value for key, value in config.items() if key not in ("lora.dora", "train.neftune")}
    assert with_defaults(stored) == config
    changed = keys_that_change_results(load_config(None, [*tiny, "lora.dora=true"]))
    assert with_defaults(stored) != changed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lora.dora=true", "lora.init=pissa"], "`lora.dora` has no `lora.init=pissa`"),
        (["lora.init_from=x", "lora.init=olora"], "leave them out"),
        (["lora.init_from=x", "lora.ranks={q_proj: 4}"], "leave them out"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(
    words: list[str], message: str, tiny: list[str]
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [*tiny, *words])
