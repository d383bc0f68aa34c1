"""The losses of each row at each visit on disk: visits.bin, a block of one step after the other, 8 bytes per visit."""

from __future__ import annotations

import mmap
import struct
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lorafit.storage.atomic import BLOCK, run_error, sync
from lorafit.storage.safe_read import open_no_follow

# Before the visits of a step: what begins a block, the step, the number of visits, CRC-32 of all of these.
_HEAD = struct.Struct("<4sIII")
_MARK = b"visi"
# The row's number over all sources, the mean loss of its targets, and the loss of the last one, which ends the answer.
VISIT = np.dtype([("row", "<u4"), ("loss", "<f2"), ("end", "<f2")])


class Visits(NamedTuple):
    """Visits of rows in the order of training, all (visits,). `damaged` are the bytes that could not be read."""

    steps: NDArray[np.int64]
    rows: NDArray[np.int64]
    losses: NDArray[np.float64]
    ends: NDArray[np.float64]
    damaged: int = 0


class VisitLog:
    """Appends the visits of each step to `path`: one write per step, so a killed run leaves one torn block at most."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._writing(BLOCK):
            self._file = open_no_follow(path, "ab")
            sync(path.parent)

    def add(self, step: int, rows: NDArray[np.int64], losses: NDArray[np.float64]) -> None:
        """The visits of a step: `losses` (2, rows) are the mean over the targets of each row, and the last one."""
        visits = np.empty(len(rows), VISIT)
        with np.errstate(over="ignore"):  # a loss above 65,504 is infinite here
            visits["row"], visits["loss"], visits["end"] = rows, losses[0], losses[1]
        block = _block(step, visits.tobytes())
        with self._writing(len(block)):
            written = self._file.write(block)
            if written < len(block):
                self._file.write(block[written:])

    def close(self) -> None:
        self._file.close()

    def _writing(self, num_bytes: int) -> AbstractContextManager[None]:
        hint = "free some space or choose another output folder, then resume the run"
        return run_error("cannot write the losses of the rows", self.path, num_bytes, hint)


def read_visits(path: Path) -> Visits:
    """All visits up to the first damaged block. Raises RunError where the file cannot be read."""
    steps, parts, end, size = [], [np.empty(0, VISIT)], 0, 0
    for step, visits, end, size in _blocks(path):  # noqa: B007
        parts.append(visits)
        steps.append(step)
    visits = np.concatenate(parts)
    return Visits(
        np.repeat(np.array(steps, np.int64), [len(part) for part in parts[1:]]),
        visits["row"].astype(np.int64),
        visits["loss"].astype(np.float64),
        visits["end"].astype(np.float64),
        size - end,
    )


def truncate_visits(path: Path, step: int) -> int:
    """Remove the visits after `step`, where a run resumes, and what follows a damaged block.

    Returns the last step that has its visits, at most `step`. Raises RunError.
    """
    last = stop = 0
    for at, _, end, _ in _blocks(path):
        if at > step:
            break
        last, stop = at, end
    with run_error("cannot write the losses of the rows", path), open_no_follow(path, "ab") as file:
        file.truncate(stop)
    return last


def _block(step: int, content: bytes) -> bytes:
    count = len(content) // VISIT.itemsize
    check = zlib.crc32(content, zlib.crc32(struct.pack("<II", step, count)))
    return _HEAD.pack(_MARK, step, count, check) + content


def _blocks(path: Path) -> Iterator[tuple[int, NDArray[np.void], int, int]]:
    """(step, visits, where the block ends, size of the file) of each block before the first damaged one.

    A file without one gives step 0 without visits.
    """
    with run_error("cannot read the losses of the rows", path), open_no_follow(path, "rb") as file:
        size = file.seek(0, 2)
        if not size:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            at = before = 0
            while at + _HEAD.size <= size:
                _, step, count, _ = _HEAD.unpack_from(data, at)
                stop = at + _HEAD.size + count * VISIT.itemsize
                if stop > size or step <= before:
                    break
                content = data[at + _HEAD.size : stop]
                if data[at:stop] != _block(step, content):
                    break
                yield step, np.frombuffer(content, VISIT), stop, size
                at, before = stop, step
            if at == 0:
                yield 0, np.empty(0, VISIT), 0, size
