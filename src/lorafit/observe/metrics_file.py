"""The metrics of a run on disk: metrics.jsonl, one JSON object per line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lorafit.errors import RunError
from lorafit.observe.events import Event, Progress, Step
from lorafit.storage.atomic import BLOCK, run_error, sync, write_file
from lorafit.storage.safe_read import MB, open_no_follow, parse_json, read_bytes

MAX_BYTES = 4096 * MB  # of the file: ten million steps take half of it


class Record:
    """An observer that appends every event to `path`.

    Each line is one write, so a killed run leaves at most one torn line at the end. Opening the record again removes
    that line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._writing(BLOCK):
            self._file = open_no_follow(path, "ab")
            self._file.truncate(_whole(path.read_bytes()))
            sync(path.parent)  # a later sync of the file needs its name on disk

    def __call__(self, event: Event) -> None:
        if isinstance(event, Progress):
            return
        line = _line(event)
        with self._writing(len(line)):
            written = self._file.write(line)
            if written < len(line):  # the disk became full: the rest of the line raises the error
                self._file.write(line[written:])

    def close(self) -> None:
        self._file.close()

    def _writing(self, num_bytes: int) -> AbstractContextManager[None]:
        hint = "free some space or choose another output folder, then resume the run"
        return run_error("cannot write the run's metrics", self.path, num_bytes, hint)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every event in `path`, oldest first, without a torn last line.

    Raises RunError when the file cannot be read or a line before the last is not a JSON object.
    """
    events = []
    for number, (_, event) in enumerate(_lines(path), start=1):
        if event is None:
            hint = "another program has changed the file; delete that line to read the rest"
            message = "a line of the run's metrics is not a JSON object"
            raise RunError(message, place=f"{path}:{number}", hint=hint)
        events.append(event)
    return events


def read_whole_events(path: Path) -> tuple[list[dict[str, Any]], int]:
    """(every event in `path` that can be read, oldest first; the number of damaged lines). ([], 0) without a file.

    Raises RunError when the file exists and cannot be read.
    """
    lines = [event for _, event in _lines(path)] if path.exists() else []
    return [event for event in lines if event is not None], lines.count(None)


def truncate_after(path: Path, step: int) -> int:
    """Remove the events after `step`, where a run resumes, and damaged lines; returns the number of the latter.

    The file is replaced atomically, and the lines that stay keep their bytes. Raises RunError.
    """
    events = list(_lines(path))
    kept = [line for line, event in events if event is not None and (number(event.get("step")) or 0) <= step]
    write_file(path, b"".join(kept).decode())
    return sum(event is None for _, event in events)


def number(value: object) -> float | None:
    """`value` if it is a number that can be shown: finite, and below 10^100. The file may hold any values."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e100:
        return None
    return float(value)


def series(events: Iterable[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, value) of the events in order, where both are numbers that can be shown."""
    pairs = ((number(event.get("step")), number(event.get(name))) for event in events)
    return [(step, value) for step, value in pairs if step is not None and value is not None]


def _line(event: Event) -> bytes:
    """The event as one line of JSON. A number that JSON does not have becomes null, and `note` names it."""
    fields = event.as_dict()
    if isinstance(event, Step):
        del fields["num_steps"]  # the same in every line, so only run_started has it
    notes = []
    for key, value in fields.items():
        if isinstance(value, float) and not math.isfinite(value):
            fields[key] = None
            notes.append(f"{key} is {value}")
    if notes:
        fields["note"] = ", ".join(notes)
    text = json.dumps(fields, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode(errors="backslashreplace")  # a lone surrogate becomes its JSON escape


def _whole(content: bytes) -> int:
    """The number of bytes of `content` that are whole lines."""
    return content.rfind(b"\n") + 1


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """The whole lines of `path`, each with its event, None for a damaged one."""
    with run_error("cannot read the run's metrics", path):
        content = read_bytes(path, MAX_BYTES)
    for line in content[: _whole(content)].splitlines(keepends=True):
        try:
            event = parse_json(line.decode())
        except ValueError:  # not UTF-8 or not JSON
            event = None
        yield line, event if isinstance(event, dict) else None
