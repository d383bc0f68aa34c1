"""The ids of rows, a hash of their own content, and the files that name rows by them (`data.drop_rows`)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lorafit.errors import DataError, Problem
from lorafit.storage.safe_read import MB, parse_json, read_bytes

Hashes = NDArray[np.uint64]
MAX_BYTES = 256 * MB
_ID = re.compile(r"([0-9a-f]{16})(?:\.([1-9][0-9]{0,8}))?")
_ODD, _MIX, _FIELD = (
    np.uint64(number) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
_NUM_LISTED = 5


def row_id(content: int, occurrence: int) -> str:
    """The id of a row: 16 digits of the hash of its content, and `.2` for the second row of equal content."""
    return f"{content:016x}" + (f".{occurrence}" if occurrence > 1 else "")


def mixed(values: Hashes, *numbers: int | NDArray[np.integer]) -> Hashes:
    """A hash of each of `values` and of `numbers`, single ones or one for each value (splitmix64)."""
    for number in numbers:
        values = (values ^ np.asarray(number).astype(np.uint64) * _ODD) + _ODD
        values = (values ^ values >> np.uint64(30)) * _MIX
        values = (values ^ values >> np.uint64(27)) * _FIELD
        values = values ^ values >> np.uint64(31)
    return values


class Contents(NamedTuple):
    """Rows by their own content: `numbers`, `hashes` and `times` (rows,), the occurrence of each hash, from 1; of the
    pieces that rows were split into (pieces,), `row_of` and `piece`, the number of each within its row.
    """

    numbers: NDArray[np.int64]
    hashes: Hashes
    times: NDArray[np.int64]
    row_of: NDArray[np.intp]
    piece: NDArray[np.intp]

    @classmethod
    def of(cls, numbers: NDArray[np.int64], hashes: Hashes) -> Contents:
        """Of the ascending numbers and the hashes of all pieces."""
        rows, first, row_of = np.unique(numbers, return_index=True, return_inverse=True)
        times = occurrences(hashes[first])
        return cls(rows, hashes[first], times, row_of, np.arange(len(numbers)) - first[row_of])

    def among(self, ids: Collection[tuple[int, int]]) -> dict[tuple[int, int], int]:
        """The place in `numbers` of each of `ids`, (hash, occurrence), that is of a row."""
        at = np.flatnonzero(np.isin(self.hashes, np.array([content for content, _ in ids], np.uint64)))
        found = {(int(self.hashes[row]), int(self.times[row])): int(row) for row in at}
        return {id_: found[id_] for id_ in ids if id_ in found}

    def id(self, row: int) -> str:
        """The id of the row at place `row`."""
        return row_id(int(self.hashes[row]), int(self.times[row]))


def occurrences(hashes: Hashes) -> NDArray[np.int64]:
    """How often each of `hashes` stands up to its own place, from 1."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)])
    counts = np.diff(np.append(starts, len(ordered)))
    found = np.empty(len(hashes), np.int64)
    found[order] = np.arange(len(ordered)) - np.repeat(starts, counts) + 1
    return found


def read_ids(names: Sequence[str]) -> dict[tuple[int, int], str]:
    """The ids that `names` give, as (hash, occurrence), each with the place where it stands.

    A name is an id, or a file with an id per line, or with the lines of `lorafit rows --json`. Raises DataError with
    all that is wrong.
    """
    ids: dict[tuple[int, int], str] = {}
    problems: list[Problem] = []
    wrong: dict[str, list[int]] = {}
    for name in names:
        if match := _ID.fullmatch(name):
            ids[int(match[1], 16), int(match[2] or 1)] = "data.drop_rows"
            continue
        try:
            for number, text in _ids_in(Path(name).expanduser()):
                if match := _ID.fullmatch(text):
                    ids[int(match[1], 16), int(match[2] or 1)] = f"{name}:{number}"
                else:
                    wrong.setdefault(name, []).append(number)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", "") or "it is not UTF-8 text"
            problems.append(Problem(f"cannot read the ids of rows: {reason}", name))
    for name, lines in wrong.items():
        listed = ", ".join(map(str, lines[:_NUM_LISTED])) + (" ..." if len(lines) > _NUM_LISTED else "")
        problems.append(
            Problem(
                f"no id of a row stands in {len(lines)} line{'s' if len(lines) > 1 else ''}: {listed}",
                name,
                "`lorafit rows RUN --ids` prints the ids of rows, one per line",
            )
        )
    if problems:
        raise DataError.of(problems)
    return ids


def _ids_in(path: Path) -> Iterator[tuple[int, str]]:
    """(number of the line, text that should be an id) of each line that is not empty."""
    for number, line in enumerate(read_bytes(path, MAX_BYTES).decode().splitlines(), 1):
        text = line.strip()
        if text.startswith("{"):
            try:
                value = parse_json(text)
            except ValueError:
                value = {}
            if (
                "id" not in value and "rows" in value
            ):  # the line of `lorafit rows --json` that counts the rows
                continue
            text = str(value.get("id", ""))
        if text:
            yield number, text
