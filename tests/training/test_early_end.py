"""A run that ends early: after so many measurements without a better one, saved and reported as such, and resumable."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.runs import digest, events, interrupt_after, tiny_run

from lorafit.errors import LorafitError, RunError
from lorafit.observe.run_summary import summarize
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import sha256_file
from lorafit.training import loop
from lorafit.training.checkpoint import read_state
from lorafit.training.run import Result, resume_run

pytestmark = pytest.mark.slow

SCORES = [9.0, 3.0, 1.0, 2.0, 0.9, 2.0, 2.1, 2.2, 0.1, 0.2]  # of the base, then after each step


@pytest.fixture(scope="module")
def material(tiny: list[str]) -> list[str]:
    return [*tiny, "train.eval_every=1", "train.save_every=1000", "train.max_steps=8"]


@pytest.fixture(autouse=True)
def scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out losses by the step that they are measured after, however often a run is resumed."""
    measure = loop._measure

    def scored(job: loop.TrainContext, saver: object, state: loop.TrainState) -> bool:
        both = iter([SCORES[0], SCORES[state.step]] if state.base_loss is None else [SCORES[state.step]])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "heldout_loss", lambda *_: next(both))
            return measure(job, saver, state)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "_measure", scored)


def steps(result: Result) -> list[int]:
    return [event["step"] for event in events(result, "step")]


@pytest.mark.parametrize(("patience", "last"), [(0, 8), (1, 3), (2, 6), (3, 7), (4, 8)])
def test_a_run_ends_after_so_many_measurements_without_a_better_one(
    material: list[str], tmp_path: Path, patience: int, last: int
) -> None:
    result = tiny_run(material, tmp_path / "run", f"train.patience={patience}")
    assert result.finished
    assert steps(result) == list(range(1, last + 1))
    best = 2 if last == 3 else 8 if last == 8 else 4
    checkpoint = RunDirectory.open(result.path).checkpoint(best)
    assert digest(result) == sha256_file(checkpoint / "adapter_model.safetensors")
    (ended,) = events(result, "run_ended")
    assert ended["reason"] == ("ended early" if last < 8 else "finished")
    assert summarize(RunDirectory.open(result.path)).state == ended["reason"]
    saved = events(result, "saved")[-1]
    assert (saved["step"], saved["reason"]) == (last, "ended early" if last < 8 else "best")
    notes = [event["text"] for event in events(result, "note")]
    assert any(text.startswith(f"ended early: {patience} held-out") for text in notes) == (last < 8)


def test_a_run_that_ended_early_is_finished_and_goes_on_only_with_more_patience(
    material: list[str], tmp_path: Path
) -> None:
    first = tiny_run(material, tmp_path / "run", "train.patience=2")
    before = {path: path.read_bytes() for path in first.path.rglob("*") if path.is_file()}
    assert resume_run(first.path, quiet=True) == first
    assert {path: path.read_bytes() for path in first.path.rglob("*") if path.is_file()} == before
    with pytest.raises(RunError, match="is complete"):
        resume_run(first.path, ["train.log_every=3"], quiet=True)
    longer = resume_run(first.path, ["train.patience=4"], quiet=True)
    whole = tiny_run(material, tmp_path / "whole", "train.patience=0")
    assert steps(longer) == steps(whole) == list(range(1, 9))
    assert digest(longer) == digest(whole)


def test_killed_between_the_last_save_and_the_adapter_it_still_ends_there(
    material: list[str], tmp_path: Path
) -> None:
    first = tiny_run(material, tmp_path / "run", "train.patience=2")
    expected = digest(first)
    shutil.rmtree(first.adapter)
    again = resume_run(first.path, quiet=True)
    assert (again.finished, again.step, digest(again)) == (True, 6, expected)
    assert steps(again) == list(range(1, 7))


@pytest.mark.parametrize("step", [3, 5, 6])
def test_interrupted_on_the_way_it_ends_at_the_same_step(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    whole = tiny_run(material, tmp_path / "whole", "train.patience=2")
    with monkeypatch.context() as patch:
        interrupt_after(step, patch)
        cut = tiny_run(material, tmp_path / "cut", "train.patience=2")
    assert (cut.finished, cut.step) == (False, step)
    resumed = resume_run(cut.path, quiet=True)
    assert (resumed.finished, resumed.step, digest(resumed)) == (True, 6, digest(whole))
    assert read_state(RunDirectory.open(cut.path).checkpoint(6)).num_worse == 2
    again = resume_run(cut.path, quiet=True)
    assert again == resumed


def test_patience_without_held_out_rows_is_refused(material: list[str], tmp_path: Path) -> None:
    with pytest.raises(LorafitError, match="no row is held out") as caught:
        tiny_run(material, tmp_path / "run", "train.patience=2", "data.holdout=0")
    assert caught.value.problems[0].place == "train.patience"
    assert not (tmp_path / "run").exists()


def test_a_real_run_that_diverges_is_told_so(tmp_path: Path) -> None:
    demo = Path(__file__).parents[2] / "demo"
    words = [
        f"model.name={demo / 'model'}",
        f"data.path={demo / 'rows.json'}",
        "model.dtype=float32",
        "run.samples=0",
        "run.verify=false",
        "run.verify=false",
    ]
    words += [
        "model.device=cpu",
        "train.batch_size=4",
        "train.max_steps=22",
        "train.warmup=5",
        "data.holdout=0",
    ]
    result = tiny_run(words, tmp_path / "run", "train.learning_rate=0.5", "train.schedule=constant")
    (found,) = events(result, "diagnosis")
    assert found["what"] == "divergence"
    assert "the learning rate is too high" in found["hint"]
    verdicts = {verdict["name"]: verdict for verdict in json.loads((result.path / "check.json").read_text())}
    assert verdicts["learning rate"]["verdict"] == verdicts["trial step"]["verdict"] == "warn"
    told = [event["text"] for event in events(result, "note") if event["level"] == "warning"]
    assert any(text.startswith("trial step: ") for text in told)
    assert events(tiny_run(words, tmp_path / "calm", "train.learning_rate=3e-3"), "diagnosis") == []


def test_a_loss_within_the_tolerance_of_the_lowest_is_a_better_one(
    material: list[str], tmp_path: Path
) -> None:
    result = tiny_run(material, tmp_path / "run", "train.patience=1", "train.tolerance=1.2")
    assert steps(result) == [1, 2, 3, 4, 5]  # after step 3 the loss is twice the lowest, after step 5 more
    checkpoint = RunDirectory.open(result.path).checkpoint(4)
    assert digest(result) == sha256_file(checkpoint / "adapter_model.safetensors")
