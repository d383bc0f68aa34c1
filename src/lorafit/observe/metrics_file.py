"""The metrics of a run on disk: metrics.jsonl, one JSON object per line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from lorafit.errors import RunError
from lorafit.observe.events import Event, Progress, Step
from lorafit.storage.atomic import BLOCK, run_error, sync, write_lines
from lorafit.storage.safe_read import MB, num_whole, open_no_follow, parse_json, read_lines

MAX_BYTES = 4096 * MB  # of the file: ten million steps take half of it
STEP = b'{"event": "step", '  # the begin of the line of a step


class Record:
    """An observer that appends every event to `path`.

    Each line is one write, so a killed run leaves at most one torn line at the end. Opening the record again removes
    that line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._writing(BLOCK):
            self._file = open_no_follow(path, "ab")
            self._file.truncate(num_whole(path))
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


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Every event in `path`, oldest first, without a torn last line. The file is not held in memory.

    Raises RunError when the file cannot be read or a line before the last is not a JSON object.
    """
    for number, (_, event) in enumerate(_lines(path), start=1):
        if event is None:
            hint = "another program has changed the file; delete that line to read the rest"
            message = "a line of the run's metrics is not a JSON object, or is too long"
            raise RunError(message, place=f"{path}:{number}", hint=hint)
        yield event


def read_raw_lines(path: Path) -> Iterator[bytes]:
    """The lines of `path` with their ends, for `event_of`; none without a file. A line that is too long comes as b"".

    Raises RunError when the file exists and cannot be read.
    """
    with run_error("cannot read the run's metrics", path), suppress(FileNotFoundError):
        yield from read_lines(path, MAX_BYTES)


def event_of(line: bytes) -> dict[str, Any] | None:
    """The event in a line, None for a damaged one."""
    try:
        event = parse_json(line.decode())
    except ValueError:  # not UTF-8 or not JSON
        return None
    return event if isinstance(event, dict) else None


def truncate_after(path: Path, step: int) -> int:
    """Remove the events after `step`, where a run resumes, and damaged lines; returns the number of the latter.

    The file is replaced atomically, and the lines that stay keep their bytes. Raises RunError.
    """
    num_damaged = 0

    def kept() -> Iterator[bytes]:
        nonlocal num_damaged
        for line, event in _lines(path):
            if event is None:
                num_damaged += 1
            elif (number(event.get("step")) or 0) <= step:
                yield line

    write_lines(path, kept())
    return num_damaged


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


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """The whole lines of `path`, each with its event, None for a damaged one."""
    with run_error("cannot read the run's metrics", path):
        for line in read_lines(path, MAX_BYTES):
            yield line, event_of(line)
