"""An adapter answers on its own base only: every command that puts one on compares, by one rule."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.command import Cli
from tests.runs import run_to_export
from tests.tiny_models import random_network, write_adapter, write_model

from lorafit.errors import ModelError
from lorafit.export.run import export_run
from lorafit.hub.client import ModelFolder
from lorafit.infer.model import load
from lorafit.infer.multi_adapter import load_many
from lorafit.model import base_check
from lorafit.model.base_check import check_base
from lorafit.model.lora import LoraSpec

OTHER = "the adapter was made on another base model"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run beside its base; the base is only changed by `changed`."""
    return run_to_export(tmp_path_factory.mktemp("base"))


@pytest.fixture
def changed(run: Path) -> Iterator[Path]:
    """The run, while one byte of its base is another one: the last of a number's mantissa."""
    weights = run.parent / "model" / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-4] + bytes([before[-4] ^ 1]) + before[-3:])
    yield run
    weights.write_bytes(before)


def words_of(command: str, run: Path, output: Path) -> list[str]:
    base = str(run.parent / "model")
    train = ["--model", base, "--data", str(run.parent / "rows.json"), "--output", str(output)]
    quick = [
        "model.device=cpu",
        "model.dtype=float32",
        "run.samples=0",
        "run.verify=false",
        "train.max_steps=1",
    ]
    init = f"lora.init_from={run / 'adapter'}"
    return {
        "generate": ["generate", str(run), "hi", "--device", "cpu", "--max-tokens", "1"],
        "generate --adapter": [
            "generate",
            base,
            "hi",
            "--adapter",
            str(run / "adapter"),
            "--max-tokens",
            "1",
        ],
        "chat": ["chat", str(run), "--device", "cpu", "--max-tokens", "1"],
        "eval": ["eval", str(run), "--offline"],
        "train": ["train", *train, *quick, init],
        "check": ["check", *train, *quick, init],
        "serve": ["serve", str(run), "--port", "0", "--device", "cpu"],
        "export": ["export", str(run), "merged", "--output", str(output)],
    }[command]


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("generate", "--other-base"),
        ("generate --adapter", "--other-base"),
        ("chat", "--other-base"),
        ("eval", "--other-base"),
        ("train", "lora.other_base=true"),
        ("check", "lora.other_base=true"),
        ("serve", None),  # it would not end: see the test of load_many
        ("export", None),
    ],
)
def test_every_command_refuses_another_base_and_takes_it_when_told_to(
    command: str,
    flag: str | None,
    changed: Path,
    tmp_path: Path,
    cli: Cli,
    caplog: pytest.LogCaptureFixture,
) -> None:
    words = words_of(command, changed, tmp_path / "out")
    refused = cli(*words, stdin="hi\n")
    said = refused.out + refused.err
    assert said.count(OTHER) == 1
    assert refused.code == 2
    assert str(changed / "adapter") in said
    assert f"accept this one with {flag}" in said if flag else flag is None
    caplog.clear()
    if flag is not None:
        accepted = cli(*words, flag, stdin="hi\n")
        assert accepted.code == 0, accepted.err
        assert (accepted.out + accepted.err + caplog.text).count(OTHER) == 1


def test_the_api_and_the_server_by_the_same_rule(changed: Path, caplog: pytest.LogCaptureFixture) -> None:
    ask: list[Callable[..., object]] = [load, lambda path, **how: load_many([str(path)], **how)]
    for function in ask:
        with pytest.raises(ValueError, match=OTHER) as caught:
            function(changed, device="cpu")
        (problem,) = caught.value.problems  # type: ignore[attr-defined]
        assert problem.place == str(changed / "adapter")
        caplog.clear()
        function(changed, device="cpu", other_base=True)
        assert [OTHER in record.getMessage() for record in caplog.records] == [True]


def test_a_copy_of_the_base_is_the_base_and_the_adapter_takes_its_fingerprint_along(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, other = tmp_path / "copied", write_model(tmp_path / "other", seed=1)
    shutil.copytree(run.parent / "model", base)
    moved = tmp_path / "moved"
    shutil.copytree(run / "adapter", moved)
    exported = export_run(run, "adapter", output=tmp_path / "exported", verify=False).path
    for adapter in (moved, exported, run / "checkpoints" / "step-000003"):
        load(base, adapter=adapter, device="cpu")
        with pytest.raises(ModelError, match=OTHER):
            load(other, adapter=adapter, device="cpu")
    served = load_many([str(base), f"a={run}", f"b={moved}"], device="cpu")
    assert set(served.named) == {"copied", "a", "b"}
    assert not caplog.records


SPEC = LoraSpec(4, 8.0, 0.0, ("q_proj",), False)
OWN, UNKNOWN = "own", "unknown"


@pytest.mark.parametrize(
    ("named", "given", "outcome"),
    [
        ("base", "base", OWN),
        ("base", "copy", OWN),
        ("base", "other", OTHER),
        ("base/../base", "base", OWN),
        ("quantised", "base", UNKNOWN),  # the base's own copy in 4 bits
        ("gone", "base", UNKNOWN),
        ("", "base", UNKNOWN),
        ("owner/base", "base", UNKNOWN),
        ("owner/base", "owner/base", OWN),
        ("Owner/Base", "owner/base", OWN),
        ("owner/base", "mirror/base", UNKNOWN),
        ("owner/base-bnb-4bit", "mirror/base", UNKNOWN),
        ("owner/base", "owner/other", OTHER),
        ("cached/base", "base", OWN),
        ("cached/base", "other", OTHER),
        ("cached/base", "owner/copy", OWN),
    ],
)
def test_an_adapter_of_another_program_is_compared_with_the_base_that_it_names(
    named: str, given: str, outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("base", "copy", "owner-copy"):
        write_model(tmp_path / name)
    write_model(tmp_path / "other", seed=1)
    quantised = write_model(tmp_path / "quantised", seed=2) / "config.json"
    quantised.write_text(json.dumps({**json.loads(quantised.read_text()), "quantization_config": {"a": 1}}))
    if named and "/" not in named.replace("/../", ""):
        named = str(tmp_path / named)
    folder = tmp_path / given.replace("owner/copy", "copy")
    adapter = write_adapter(tmp_path / "adapter", random_network(), SPEC, base=named)
    find = base_check.model_folder

    def cached(name: str, **how: object) -> ModelFolder:
        return find(str(tmp_path / "base") if name == "cached/base" else name, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(base_check, "model_folder", cached)
    name = given if "/" in given else str(folder)
    if outcome == OTHER:
        with pytest.raises(ModelError, match=OTHER):
            check_base(adapter, folder, name, flag="--other-base")
        assert OTHER in check_base(adapter, folder, name, accepted=True)
    else:
        note = check_base(adapter, folder, name)
        assert (note == "") == (outcome == OWN), note
        assert outcome == OWN or "is not known" in note


def test_what_cannot_be_known_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = write_model(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", random_network(), SPEC, base=str(tmp_path / "gone"))
    with caplog.at_level(logging.WARNING):
        load(base, adapter=adapter, device="cpu")
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if "is not known" in line] == [
        f"note: whether the adapter {adapter} was made on {base} is not known: it names `{tmp_path / 'gone'}`, "
        "which cannot be compared here"
    ]
