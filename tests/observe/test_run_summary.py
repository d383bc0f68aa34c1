"""What `lorafit runs` says of a run, from its files alone, in whatever state they are."""

from __future__ import annotations

import json
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.config.load import load_config, with_absolute_paths
from lorafit.observe.events import Event, Heldout, RunEnded, RunStarted, Step
from lorafit.observe.metrics_file import Record
from lorafit.observe.run_summary import summarize
from lorafit.run_dir import RunDirectory, find_runs
from lorafit.storage.locks import lock

STARTED = RunStarted("owner/name", 10, 4, 1000, 10, "cpu", "float32", "runs/a")


def step(number: int, loss: float) -> Step:
    return Step(number, 4, number / 4, loss, 2e-4, 0.5, 90, 120, 4, 300.0, 0.4, 10**9)


def make(folder: Path, *events: Event) -> RunDirectory:
    folder.mkdir(parents=True)
    run = RunDirectory(folder)
    run.write_config(load_config(None, ["model.name=owner/name", "data.path=rows.json"]))
    run.adapter.mkdir()
    (run.adapter / "manifest.json").write_text("{}")
    if events:
        with closing(Record(run.metrics_file)) as record:
            for event in events:
                record(event)
    return run


STEPS = (STARTED, step(1, 3.0), Heldout(1, 2.5, 2.9, True), step(2, 2.0), Heldout(2, 2.6, 2.9, False))


@pytest.mark.parametrize("reason", ["finished", "ended early", "interrupted"])
def test_a_run_that_ended_says_how(reason: Any, tmp_path: Path) -> None:
    run = make(tmp_path / "run", *STEPS, RunEnded(2, reason, 9.0, "adapter", 2.0))
    summary = summarize(run)
    assert summary.state == reason
    assert (summary.model, summary.step, summary.num_steps) == ("owner/name", 2, 4)
    assert (summary.loss, summary.heldout_loss, summary.base_loss) == (2.0, 2.5, 2.9)
    assert summary.cells()[:6] == ["owner/name", reason, "2/4", "2.000", "2.500", "2.900"]
    assert json.loads(json.dumps(summary.as_dict()))["state"] == reason


def test_a_run_that_a_process_holds_is_running(tmp_path: Path) -> None:
    run = make(tmp_path / "run", *STEPS)
    with lock(run.lock_file):
        assert summarize(run).state == "running"
    assert summarize(run).state == "stopped"


def test_a_run_that_ended_without_a_word_is_stopped(tmp_path: Path) -> None:
    run = make(tmp_path / "run", *STEPS)
    with run.metrics_file.open("a") as file:
        file.write('{"event": "run_ended", "reas')
    assert summarize(run).state == "stopped"


def test_a_run_that_is_resumed_after_its_end_is_no_longer_ended(tmp_path: Path) -> None:
    run = make(tmp_path / "run", *STEPS, RunEnded(2, "interrupted", 9.0, "adapter", 2.0), step(3, 1.0))
    assert (summarize(run).state, summarize(run).step) == ("stopped", 3)


def test_a_run_before_its_first_step_has_no_losses(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    summary = summarize(run)
    assert (summary.state, summary.step, summary.num_steps) == ("stopped", 0, None)
    assert summary.cells()[2:6] == ["0", "-", "-", "-"]


@pytest.mark.parametrize("file", ["config.yaml", "metrics.jsonl"])
def test_a_run_that_cannot_be_read_is_named_and_hides_no_other(file: str, tmp_path: Path) -> None:
    run = make(tmp_path / "a", *STEPS)
    make(tmp_path / "b", *STEPS)
    (run.path / file).write_bytes(b"\xff: [\n")
    states = {run.path.name: summarize(run).state for run in find_runs(tmp_path)}
    assert states == {"a": "unreadable", "b": "stopped"}


def contents(run: RunDirectory) -> dict[Path, tuple[bytes, int]]:
    files = (path for path in run.path.rglob("*") if path.is_file())
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_looking_changes_nothing(tmp_path: Path) -> None:
    run = make(tmp_path / "run", *STEPS)
    with lock(run.lock_file):
        pass
    before = contents(run)
    summarize(run)
    assert contents(run) == before


def test_runs_are_found_two_levels_deep_newest_first(tmp_path: Path) -> None:
    for age, name in enumerate(["a", "deep/b", "c"]):
        run = make(tmp_path / name)
        os.utime(run.config_file, (1e9 - age, 1e9 - age))
    make(tmp_path / "much" / "too" / "deep")
    assert [run.path.relative_to(tmp_path).as_posix() for run in find_runs(tmp_path)] == ["a", "deep/b", "c"]
    assert [run.path for run in find_runs(tmp_path / "a")] == [tmp_path / "a"]


ANY = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.lists(st.integers(), max_size=2)
)
FIELDS = st.sampled_from(["step", "loss", "num_steps", "base_loss", "reason", "x"])
EVENTS = st.builds(
    lambda kind, fields: {**fields, "event": kind},
    st.sampled_from(["run_started", "step", "heldout", "run_ended"]) | ANY,
    st.dictionaries(FIELDS, ANY, max_size=4),
)


@pytest.fixture(scope="module")
def scribbled(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return make(tmp_path_factory.mktemp("summary") / "run")


@given(st.lists(EVENTS, max_size=5))
def test_any_metrics_give_a_summary(scribbled: RunDirectory, events: list[dict[str, Any]]) -> None:
    scribbled.metrics_file.write_text("".join(json.dumps(event) + "\n" for event in events))
    summary = summarize(scribbled)
    assert summary.state in {"finished", "interrupted", "stopped", "unreadable"}
    assert len(summary.cells()) == 8


@pytest.mark.parametrize(
    "name", ["/srv/models/a-b_1.0", "owner/name", "null", "1e5", "C:\\models", "a: b", "모델", "~", "yes"]
)
def test_the_name_of_a_model_is_read_as_the_whole_config_says(tmp_path: Path, name: str) -> None:
    run = RunDirectory(tmp_path)
    run.write_config(load_config(None, [f"model.name='{name}'", "data.path=x.json"]))
    assert run.model_name() == run.config().model.name == with_absolute_paths(run.config()).model.name
