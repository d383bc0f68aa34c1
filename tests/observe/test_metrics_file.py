"""metrics.jsonl holds one whole JSON object a line, whatever happens to the process that writes it."""

from __future__ import annotations

import json
import math
import os
import tracemalloc
from contextlib import closing
from pathlib import Path

import pytest

from lorafit.errors import RunError
from lorafit.observe.curve_monitor import CurveMonitor
from lorafit.observe.events import Heldout, Message, RunEnded, RunStarted, Saved, Step
from lorafit.observe.metrics_file import Record, read_metrics, truncate_after
from lorafit.storage.safe_read import MB

STARTED = RunStarted("tiny", 10, 4, 1000, 10, "cpu", "float32", "runs/a")


def step(number: int, loss: float = 2.0, grad_norm: float = 0.5) -> Step:
    return Step(number, 4, number / 4, loss, 2e-4, grad_norm, 90, 120, 4, 300.0, 0.4, 10**9)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def written(path: Path) -> list[str]:
    return [f"{event['event']} {event.get('step', '')}".strip() for event in read_metrics(path)]


def test_a_step_has_the_keys_that_others_rely_on(path: Path) -> None:
    with closing(Record(path)) as record:
        record(step(1))
    (event,) = read_metrics(path)
    required = "event step loss learning_rate grad_norm supervised_tokens tokens tokens_per_second seconds"
    assert set(event) == {*required.split(), "epoch", "rows", "memory_bytes", "ranks", "imbalance"}


def test_events_are_there_at_once_and_appended_to(path: Path) -> None:
    with closing(Record(path)) as record:
        record(STARTED)
        assert written(path) == ["run_started"]
        record(step(1))
        record(Heldout(1, 1.5, 2.5, True))
    with closing(Record(path)) as record:
        record(Saved(1, "checkpoints/step-000001", "best"))
        record(Message("두 줄\n\ud800", "warning"))
        record(RunEnded(1, "finished", 1.0, "adapter", 2.0))
    assert written(path) == ["run_started", "step 1", "heldout 1", "saved 1", "note", "run_ended 1"]
    assert list(read_metrics(path))[4]["text"] == "두 줄\n\ud800"
    assert path.read_bytes().count(b"\n") == 6


def test_numbers_that_json_lacks_become_null_with_a_note(path: Path) -> None:
    with closing(Record(path)) as record:
        record(step(1, loss=math.nan, grad_norm=math.inf))
    (event,) = (json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines())
    assert (event["loss"], event["grad_norm"], event["learning_rate"]) == (None, None, 2e-4)
    assert event["note"] == "loss is nan, grad_norm is inf"


def test_a_torn_last_line_is_left_out_and_cut_off(path: Path) -> None:
    with closing(Record(path)) as record:
        record(step(1))
        record(step(2))
    whole = path.read_bytes()
    for torn in range(whole.index(b"\n") + 1, len(whole)):
        path.write_bytes(whole[:torn])
        assert written(path) == ["step 1"]
    with closing(Record(path)) as record:
        record(step(3))
    assert written(path) == ["step 1", "step 3"]


def test_a_broken_line_before_the_last_is_an_error(path: Path) -> None:
    with closing(Record(path)) as record:
        record(step(1))
    path.write_bytes(b"[]\n" + path.read_bytes())
    with pytest.raises(RunError) as caught:
        list(read_metrics(path))
    assert caught.value.problems[0].place == f"{path}:1"


def test_resuming_forgets_what_came_after(path: Path) -> None:
    with closing(Record(path)) as record:
        for event in (
            STARTED,
            step(1),
            Heldout(1, 1.5, None, True),
            Saved(1, "a", "best"),
            step(2),
            Message("hm"),
        ):
            record(event)
        before = path.read_bytes()
        for event in (step(3), Heldout(3, 1.5, None, False), Saved(3, "b", "last")):
            record(event)
        record(RunEnded(3, "interrupted", 1.0, "adapter", 2.0))
    with path.open("ab") as file:
        file.write(b'{"event": "st')
    truncate_after(path, 2)
    assert path.read_bytes() == before
    truncate_after(path, 0)
    assert written(path) == ["run_started", "note"]
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


def test_an_interrupted_truncation_leaves_the_record(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Record(path)) as record:
        record(step(1))
    before = path.read_bytes()

    def fail(*args: object) -> None:
        raise OSError

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunError, match="cannot write"):
        truncate_after(path, 0)
    assert path.read_bytes() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error_with_a_way_out(path: Path) -> None:
    record = Record(path)
    record._file.close()
    record._file = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115  closed by the record
    with closing(record), pytest.raises(RunError, match="No space left") as caught:
        record(step(1))
    assert caught.value.problems[0].place == str(path)


def test_no_file_no_metrics(path: Path) -> None:
    with pytest.raises(RunError, match="cannot read the run's metrics"):
        list(read_metrics(path))
    with pytest.raises(RunError, match="cannot write the run's metrics"):
        Record(path / "nowhere")


def test_a_line_that_is_too_long_is_named_and_dropped_on_resuming(path: Path) -> None:
    with closing(Record(path)) as record:
        record(step(1))
    whole = path.read_bytes()
    long = b'{"text": "' + b"x" * (2 * MB) + b'"}\n'
    path.write_bytes(long + whole + long)
    with pytest.raises(RunError, match="too long") as caught:
        list(read_metrics(path))
    assert caught.value.problems[0].place == f"{path}:1"
    assert truncate_after(path, 1) == 2
    assert path.read_bytes() == whole


@pytest.mark.parametrize("torn", [0, 1, MB - 1, MB, 2 * MB + 1])
def test_a_torn_line_of_any_length_is_cut_off(path: Path, torn: int) -> None:
    path.write_bytes(b"{}\n" + b"\0" * torn)
    assert list(read_metrics(path)) == [{}]
    Record(path).close()
    assert path.read_bytes() == b"{}\n"
    path.write_bytes(b"\0" * torn)
    Record(path).close()
    assert path.read_bytes() == b""


def test_memory_does_not_grow_with_the_file(path: Path) -> None:
    line = json.dumps({"event": "step", "step": 1, "loss": 0.5, "text": "x" * 10_000}) + "\n"
    with path.open("w") as file:
        for _ in range(20):
            file.write(line * 100)
    tracemalloc.start()
    try:
        CurveMonitor.over(read_metrics(path))
        truncate_after(path, 1)
        Record(path).close()
        assert tracemalloc.get_traced_memory()[1] < 4 * MB < path.stat().st_size / 4
    finally:
        tracemalloc.stop()
