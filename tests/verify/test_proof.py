"""The proof after training: what is right passes, and each planted bug fails by name, with the adapter kept."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from tests.forked import run
from tests.runs import tiny_run

from lorafit.cli.main import main
from lorafit.data.formats import Instruction, Row
from lorafit.infer.model import Answer
from lorafit.observe.metrics_file import read_metrics
from lorafit.storage.atomic import commit_files, read_facts, verify_folder
from lorafit.training import checkpoint, finish, optim
from lorafit.training.run import Result
from lorafit.verify import proof, reload
from lorafit.verify.proof import Check, compare_logits, heldout, stop
from lorafit.verify.reload import reason_of

Change = Callable[[dict[str, bytes]], None]


@pytest.fixture(scope="module")
def material(tiny: list[str]) -> list[str]:
    return [*tiny, "train.max_steps=6", "run.samples=1", "run.verify=true"]


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fresh process's work is done in this one: quicker, for what does not depend on it."""

    def here(module: str, paths: Sequence[Path], *_: Any) -> str:
        assert module == "lorafit.verify.reload"
        return "it does not load" if reload.main([str(path) for path in paths]) else ""

    monkeypatch.setattr(reload, "run_module", here)


@pytest.fixture
def fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fresh process is forked from one that has the imports done."""

    def forked(module: str, paths: Sequence[Path], environment: Mapping[str, str], timeout: float) -> str:
        ended = run(module, *map(str, paths), env=environment)
        return reason_of(ended.returncode, ended.stderr.splitlines())

    monkeypatch.setattr(reload, "run_module", forked)


def checks(result: Result) -> dict[str, dict[str, Any]]:
    stored = json.loads((result.path / "proof.json").read_text())
    return {check["name"]: check for check in stored["checks"]}


def rewritten(folder: Path, change: Change) -> None:
    """Another adapter in place of the one in `folder`, committed as carefully as the first."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
    change(files)
    commit_files(folder, files, read_facts(folder))


def too_strong(files: dict[str, bytes]) -> None:
    """The scale is meant to be alpha, and the reader divides by r once more than the writer thinks."""
    config = json.loads(files["adapter_config.json"])
    config["lora_alpha"] *= config["r"]
    files["adapter_config.json"] = json.dumps(config).encode()


def no_op(files: dict[str, bytes]) -> None:
    tensors = load(files["adapter_model.safetensors"])
    zeroed = {name: t * 0 if ".lora_B." in name else t for name, t in tensors.items()}
    files["adapter_model.safetensors"] = save(zeroed)


def other_adapter(files: dict[str, bytes]) -> None:
    tensors = load(files["adapter_model.safetensors"])
    generator = torch.Generator().manual_seed(1)
    others = {name: torch.randn(t.shape, generator=generator) for name, t in tensors.items()}
    files["adapter_model.safetensors"] = save(others)


@pytest.mark.slow
def test_a_run_is_proven_in_a_fresh_process(material: list[str], tmp_path: Path) -> None:
    result = tiny_run(material, tmp_path / "run")
    assert result.proven is True
    found = checks(result)
    assert list(found) == ["changed", "reload", "stop", "heldout"]
    assert found["changed"]["values"] == {
        "tensors": 28,
        "changed": 28,
        "unchanged": [],
        "not_as_trained": [],
    }
    reload = found["reload"]
    assert reload["verdict"] == "pass"
    assert reload["values"]["error"] <= reload["values"]["bound"] < reload["values"]["effect"] / 100
    assert reload["values"]["same_token"] == 1.0
    (event,) = [event for event in read_metrics(result.path / "metrics.jsonl") if event["event"] == "proved"]
    assert (
        "28 of 28 adapter tensors changed; a fresh process loads it and gets the same logits"
        in event["lines"][0]
    )
    assert event["seconds"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [["model.quantize=int8"], ["model.quantize=nf4", "model.dtype=bfloat16"], ["model.dtype=bfloat16"]],
    ids=["int8", "nf4", "bfloat16"],
)
def test_other_bases_are_proven_in_a_fresh_process(
    overrides: list[str], material: list[str], tmp_path: Path, fork: None
) -> None:
    result = tiny_run(material, tmp_path / "run", *overrides)
    assert checks(result)["reload"]["verdict"] == "pass"
    assert result.proven is True


def test_without_verify_nothing_is_started(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reload, "run_module", None)
    result = tiny_run(material, tmp_path / "run", "run.verify=false")
    assert result.proven is None
    assert not (result.path / "proof.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (too_strong, {"changed": "pass", "reload": "fail"}),
        (no_op, {"changed": "fail", "reload": "fail"}),
        (other_adapter, {"changed": "fail", "reload": "fail"}),
    ],
)
@pytest.mark.usefixtures("one_process")
def test_what_is_on_disk_has_to_be_what_was_trained(
    change: Change,
    expected: dict[str, str],
    material: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    export = checkpoint.export_adapter

    def swapped(folder: Path, *rest: Any) -> None:
        export(folder, *rest)
        rewritten(folder, change)

    monkeypatch.setattr(finish, "export_adapter", swapped)
    result = tiny_run(material, tmp_path / "run")
    assert result.proven is False
    assert result.finished
    assert verify_folder(result.adapter) == []
    found = checks(result)
    assert {name: found[name]["verdict"] for name in expected} == expected
    if change is no_op:
        assert "but the base's" in found["reload"]["text"]


@pytest.mark.usefixtures("one_process")
def test_a_file_that_was_damaged_does_not_load(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = checkpoint.export_adapter

    def damaged(folder: Path, *rest: Any) -> None:
        export(folder, *rest)
        files = {"adapter_model.safetensors": (folder / "adapter_model.safetensors").read_bytes()}
        other_adapter(files)
        (folder / "adapter_model.safetensors").write_bytes(files["adapter_model.safetensors"])

    monkeypatch.setattr(finish, "export_adapter", damaged)
    result = tiny_run(material, tmp_path / "run")
    assert result.proven is False
    assert "cannot load the run" in checks(result)["reload"]["text"]


@pytest.mark.usefixtures("one_process")
def test_a_tensor_that_no_optimizer_moves_is_named(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = optim.AdamW
    monkeypatch.setattr(optim, "AdamW", lambda masters, *rest: make(list(masters)[1:], *rest))
    result = tiny_run(material, tmp_path / "run")
    changed = checks(result)["changed"]
    assert changed["verdict"] == "fail"
    assert changed["text"] == (
        "27 of 28 adapter tensors changed; `model.layers.0.self_attn.q_proj.lora_A.weight` did not change in training"
    )
    assert result.proven is False


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
def test_after_one_step_a_fresh_adapter_has_changed_by_half(material: list[str], tmp_path: Path) -> None:
    one_step = ["train.max_steps=1", "train.warmup=0"]
    first = tiny_run(material, tmp_path / "first", *one_step)
    assert checks(first)["changed"]["verdict"] == "pass"
    assert "14 of 28" in checks(first)["changed"]["text"]
    second = tiny_run(material, tmp_path / "second", *one_step, f"lora.init_from={first.adapter}")
    assert checks(second)["changed"]["text"] == "28 of 28 adapter tensors changed"


@pytest.mark.usefixtures("one_process")
def test_a_failed_proof_is_exit_code_1_and_keeps_the_adapter(
    material: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    export = checkpoint.export_adapter

    def swapped(folder: Path, *rest: Any) -> None:
        export(folder, *rest)
        rewritten(folder, too_strong)

    monkeypatch.setattr(finish, "export_adapter", swapped)
    monkeypatch.setattr(sys, "argv", ["lorafit", "train", *material, "--output", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'run' / 'adapter'}\n"
    assert "error: a fresh process that loads the adapter does not get the trained model's logits" in err
    assert "Traceback" not in err


def four(error: float, effect: float, noise: float, dtype: torch.dtype) -> Check:
    generator = torch.Generator().manual_seed(0)

    def random(size: float) -> torch.Tensor:
        values = torch.randn(8, 50, generator=generator, dtype=torch.float64)
        return values * size / float(values.square().mean().sqrt())

    base = random(1.0)
    live = base + random(effect)
    return compare_logits(live, base, live + random(error), base + random(noise), dtype)


@pytest.mark.parametrize(
    ("error", "effect", "noise", "dtype", "verdict"),
    [
        (0.0, 0.5, 0.0, torch.float32, "pass"),
        (0.01, 0.5, 0.0, torch.float32, "fail"),  # two percent of the effect: a wrong scale, say
        (0.01, 0.5, 0.0, torch.bfloat16, "pass"),
        (0.1, 0.5, 0.0, torch.bfloat16, "fail"),
        (0.002, 0.5, 0.0006, torch.float32, "pass"),  # within what the base is apart, too
        (0.02, 0.02, 0.01, torch.bfloat16, "warn"),  # the effect drowns
        (0.0, 0.5, 0.1, torch.float32, "fail"),  # another base
        (0.0, 0.0, 0.0, torch.float32, "fail"),  # nothing was learned
        (float("nan"), 0.5, 0.0, torch.float32, "fail"),
    ],
)
def test_verdicts_on_logits(
    error: float, effect: float, noise: float, dtype: torch.dtype, verdict: str
) -> None:
    assert four(error, effect, noise, dtype).verdict == verdict


def test_verdicts_on_held_out_loss() -> None:
    assert heldout(1.2, 0.9).verdict == "pass"
    assert heldout(1.2, 1.2).verdict == "warn"
    assert heldout(1.2, float("nan")).verdict == "warn"
    assert heldout(None, None).verdict == "skip"


class Parrot:
    """A model of which it is known which answers end."""

    def __init__(self, ends: Callable[[str], bool]) -> None:
        self.ends = ends
        tokenizer = SimpleNamespace(encode_batch=lambda texts: ((list(text), []) for text in texts))
        self.renderer = SimpleNamespace(tokenizer=tokenizer)

    def generate(self, questions: Sequence[Any], *, max_tokens: int) -> list[Answer]:
        self.max_tokens = max_tokens
        return [Answer("", 1, self.ends(question.question())) for question in questions]


def asked(*answers: str) -> list[Row]:
    return [
        Row(i, f"row {i + 1}", Instruction(f"question {i}", "", answer)) for i, answer in enumerate(answers)
    ]


def test_an_adapter_that_never_stops_is_a_warning_that_names_the_prompts() -> None:
    model: Any = Parrot(lambda question: False)
    check = stop(model, asked(*["word" * 10] * 20))
    assert (check.verdict, check.values["ended"], check.values["prompts"]) == ("warn", 0, 20)
    assert check.values["going_on"][:2] == ["row 1", "row 2"]
    assert check.text == "only 0 of 20 held-out prompts ended by themselves within 80 tokens"
    assert model.max_tokens == 80
    most: Any = Parrot(lambda question: question != "question 3")
    check = stop(most, asked(*["word"] * 20))
    assert (check.verdict, check.text) == ("pass", "19 of 20 held-out prompts ended by themselves")
    assert most.max_tokens == proof.LEAST_ANSWER


def test_long_right_answers_are_no_measure_of_stopping() -> None:
    never: Any = Parrot(lambda question: False)
    assert stop(never, asked("x" * 129, "y" * 500)).verdict == "skip"
    assert stop(never, asked()).verdict == "skip"
    check = stop(never, asked("x" * 500, "short"))
    assert check.values["prompts"] == 1


@pytest.mark.usefixtures("one_process")
def test_rows_without_a_stop_token_give_a_model_that_never_stops(material: list[str], tmp_path: Path) -> None:
    """The classic mistake, trained for real: no answer ends, and that is said."""
    result = tiny_run(
        material, tmp_path / "run", "data.template=classic", "data.eos=false", "train.max_steps=20"
    )
    found = checks(result)["stop"]
    assert (found["verdict"], found["values"]["ended"]) == ("warn", 0)
    assert result.proven is True


def test_a_probe_looks_at_the_ends_of_texts() -> None:
    rows = [(torch.arange(n).numpy().astype("uint16"), torch.ones(n).bool().numpy()) for n in (3, 300)]
    probe = reload.Probe.of(rows)
    assert probe.lengths.tolist() == [3, reload.MOST_TOKENS]
    assert probe.positions[:3].tolist() == [0, 1, 2]
    assert len(probe.positions) == 3 + reload.MOST_POSITIONS
    assert int(probe.positions[-1]) == len(probe.ids) - 1 == 258
