"""A run that ends with all its rows: the bytes of a run of that length without held-out rows, also when interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.runs import digest, events, interrupt_after, tiny_run

from lorafit.evaluate.run import evaluate_run
from lorafit.export.rows import rows_of
from lorafit.export.run_source import open_source
from lorafit.observe.run_summary import RunState, summarize
from lorafit.run_dir import RunDirectory
from lorafit.training.run import Result, resume_run

FIRST = [
    "data.holdout=8",
    "train.max_steps=6",
    "train.eval_every=2",
    "train.save_every=2",
    "lora.dropout=0.1",
]


@pytest.fixture(scope="module")
def refitted(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Result:
    return tiny_run([*tiny, *FIRST], tmp_path_factory.mktemp("refit") / "run", "train.refit=true")


def test_the_adapter_is_that_of_a_run_of_that_length_on_all_rows(
    tiny: list[str], refitted: Result, tmp_path: Path
) -> None:
    (event,) = events(refitted, "refit")
    length = event["num_steps"] - event["step"]
    without = tiny_run([*tiny, *FIRST], tmp_path / "run", "data.holdout=0", f"train.max_steps={length}")
    assert digest(refitted) == digest(without)
    second = [step["loss"] for step in events(refitted, "step") if step["step"] > event["step"]]
    assert second == [step["loss"] for step in events(without, "step")]
    assert event["num_rows"] == 40


def test_the_length_is_that_of_the_best_step_and_both_losses_stay(refitted: Result) -> None:
    (event,) = events(refitted, "refit")
    measured = {heldout["step"]: heldout["loss"] for heldout in events(refitted, "heldout")}
    assert min(measured, key=measured.__getitem__) == event["chosen_step"]
    assert refitted.heldout_loss == event["heldout_loss"] == min(measured.values())
    assert max(measured) == event["step"] == 6
    summary = summarize(RunDirectory.open(refitted.path))
    assert summary.state == RunState.FINISHED
    assert (summary.step, summary.num_steps) == (refitted.step, event["num_steps"])
    assert summary.heldout_loss == event["heldout_loss"]
    manifest = json.loads((refitted.adapter / "manifest.json").read_text())
    assert manifest["facts"]["trained_rows"] == 40


def test_no_measure_of_it_calls_a_trained_row_held_out(
    refitted: Result, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [measured.loss for measured in evaluate_run(refitted.path, offline=True)] == [None, None]
    assert "ended by training on all rows" in " ".join(capsys.readouterr().err.split())
    rows, _ = rows_of(open_source(refitted.path, offline=True), 64)
    assert rows.texts
    assert rows.name == "trained rows"


@pytest.mark.parametrize("step", [3, 6, 7, 10])
def test_a_stop_in_either_phase_gives_the_same_bytes(
    tiny: list[str], refitted: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(step, patch)
        stopped = tiny_run([*tiny, *FIRST], tmp_path / "run", "train.refit=true")
    assert not stopped.finished
    resumed = resume_run(stopped.path, quiet=True)
    assert resumed.finished
    assert digest(resumed) == digest(refitted)
    assert [e["step"] for e in events(resumed, "step")] == [e["step"] for e in events(refitted, "step")]
    again = resume_run(stopped.path, quiet=True)
    assert (again.finished, again.step) == (True, resumed.step)


def test_without_held_out_rows_there_is_no_second_phase(tiny: list[str], tmp_path: Path) -> None:
    result = tiny_run([*tiny, *FIRST], tmp_path / "run", "train.refit=true", "data.holdout=0")
    assert result.step == 6
    assert not events(result, "refit")
