"""One definition of a run's state: each combination of files, and the same answer for all that ask for it."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import pytest
from tests.tiny_models import write_model, write_rows

from lorafit.config.load import load_config
from lorafit.observe.run_summary import RunState, summarize
from lorafit.report.page import page
from lorafit.report.run_data import read_facts
from lorafit.run_dir import RunDirectory
from lorafit.storage.locks import lock
from lorafit.sweep.trials import Trial
from lorafit.training.resume import Resumption
from lorafit.training.run import resume_run, start_run

# Last event of the metrics: the state with and without an adapter; None stands for what the lock says.
STATES = {
    "run_started": (None, None),
    "step": (None, None),
    "finished": (RunState.FINISHED, None),
    "ended early": (RunState.ENDED_EARLY, None),
    "interrupted": (RunState.INTERRUPTED, RunState.INTERRUPTED),
    "unknown": (None, None),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    words = [
        f"model.name={write_model(folder / 'model')}",
        f"data.path={write_rows(folder / 'rows.json')}",
        *(
            "model.dtype=float32",
            "model.device=cpu",
            "lora.rank=2",
            "train.batch_size=6",
            "train.max_steps=2",
        ),
        *("run.verify=false", "run.samples=0", f"run.output={folder / 'run'}"),
    ]
    return start_run(load_config(None, words), quiet=True).path


def with_last_event(run: RunDirectory, last: str) -> None:
    lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    kept = [event for event in lines if event["event"] not in ("run_started", "run_ended")]
    if last == "run_started":
        kept.append({"event": "run_started", "num_steps": 2})
    elif last != "step":
        kept.append({"event": "run_ended", "step": 2, "reason": last})
    kept.append({"event": "note", "text": "a note ends nothing", "level": "info"})
    run.metrics_file.write_text("".join(json.dumps(event) + "\n" for event in kept))


@pytest.mark.parametrize(
    ("last", "has_adapter", "has_report", "is_locked"), list(product(STATES, *[[True, False]] * 3))
)
def test_all_users_see_the_same_state(
    whole: Path, tmp_path: Path, last: str, has_adapter: bool, has_report: bool, is_locked: bool
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    run = RunDirectory.open(tmp_path / "run")
    with_last_event(run, last)
    if not has_adapter:
        shutil.rmtree(run.adapter)
    if not has_report:
        run.report_file.unlink()
    state = STATES[last][0 if has_adapter else 1]
    state = state or (RunState.RUNNING if is_locked else RunState.STOPPED)
    with lock(run.lock_file) if is_locked else nullcontext():
        assert RunState.of(run) is state
        assert summarize(run).state is state
        facts = read_facts(run)
        assert facts.summary.state is state
        assert f'badge {state.replace(" ", "-")}">{state}<' in page(facts)
        assert Trial(run, {}, run.config()).finished is state.is_complete
        resumption = Resumption.of(run, ["train.patience=0"])
        assert (resumption.finished is not None) is state.is_complete


def test_a_damaged_adapter_is_not_taken_for_the_result(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    run = RunDirectory.open(tmp_path / "run")
    (run.adapter / "adapter_model.safetensors").write_bytes(b"")
    assert not Trial(run, {}, run.config()).finished
    assert Resumption.of(run, []).finished is None


def test_a_complete_run_without_a_report_gets_one(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    run = RunDirectory.open(tmp_path / "run")
    before = run.metrics_file.read_bytes()
    run.report_file.unlink()
    assert resume_run(run.path, quiet=True).finished
    assert run.report_file.exists()
    assert run.metrics_file.read_bytes() == before


def test_metrics_that_cannot_be_read_are_unreadable(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    run = RunDirectory.open(tmp_path / "run")
    run.metrics_file.write_bytes(b"\xff\n")
    assert RunState.of(run) is RunState.UNREADABLE
    run.metrics_file.unlink()
    run.metrics_file.mkdir()
    assert RunState.of(run) is RunState.UNREADABLE
    assert summarize(run).state is RunState.UNREADABLE
