"""Parts of a split, such as `train[:10]` and `train[10%:20%]`, cut as the `datasets` library cuts them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lorafit.data.folders import SourceFile
from lorafit.data.readers import read_file
from lorafit.errors import DataError

_PART = re.compile(r"([^\[\]()+]+)\[(?:(-?\d[\d_]*)(%)?)?:(?:(-?\d[\d_]*)(%)?)?\]")


@dataclass(frozen=True, slots=True)
class Part:
    """The rows `first` to `stop` of a split, or these percentages of it. Negative ones count from the end."""

    text: str
    first: int | None
    stop: int | None
    is_percent: bool

    def bounds(self, num_rows: int) -> tuple[int, int]:
        """(first row, end) of the part of a split with `num_rows`, from 0. Percentages give the nearest row."""

        def bound(value: int | None, otherwise: int) -> int:
            if value is None:
                return otherwise
            row = round(value * num_rows / 100) if self.is_percent else value
            return min(num_rows, max(0, row + num_rows if row < 0 else row))

        return bound(self.first, 0), bound(self.stop, num_rows)


def split_and_part(text: str | None, key: str) -> tuple[str | None, Part | None]:
    """The name in a value of the key `key`, and the part of that split; None for the whole. Raises DataError."""
    if text is None or not any(sign in text for sign in "[]()+"):
        return text, None
    match = _PART.fullmatch(text)
    if match is None:
        hint = "write NAME[FIRST:STOP] in rows or percent: train[:1000], train[-10%:]; give several parts as files"
        raise DataError(f"`{text}` is no part of a split", place=key, hint=hint)
    name, *bounds = match.groups()
    first, stop = (None if bound is None else int(bound) for bound in bounds[::2])
    is_percent = any(bounds[1::2])
    if is_percent and any(abs(bound or 0) > 100 for bound in (first, stop)):
        raise DataError(f"`{text}` has more than 100 percent", place=key, hint=f"{key}={name}[:100%]")
    return name, Part(text, first, stop, is_percent)


def cut(files: Sequence[SourceFile], part: Part, key: str, encoding: str, *, exact: bool) -> list[SourceFile]:
    """`files`, one split in order, with the rows of `part` only. Raises DataError where that has no rows.

    The rows of the files are counted first, unless one file is cut at rows from its beginning and need not be `exact`:
    such a file may have fewer rows.
    """
    first, stop = part.first or 0, part.stop
    if (
        not exact
        and len(files) == 1
        and not part.is_percent
        and first >= 0
        and (stop is None or stop > first)
    ):
        return [replace(files[0], first=first, stop=stop)]
    counts = [sum(1 for _ in read_file(file.path, file.name, encoding=encoding)) for file in files]
    first, end = part.bounds(sum(counts))
    kept, start = [], 0
    for file, count in zip(files, counts, strict=True):
        if max(first - start, 0) < min(end - start, count):
            stop = end - start if end - start < count else None
            kept.append(replace(file, first=max(first - start, 0), stop=stop))
        start += count
    if not kept:
        message = f"`{part.text}` has no rows: the split has {start:,}"
        raise DataError(message, place=key, hint="write a larger part")
    return kept


def without(file: SourceFile, others: Sequence[SourceFile]) -> list[SourceFile]:
    """The rows of `file` that `others` do not have, as files; `others` are of the same path."""
    pieces = [file]
    for other in others:
        sides = [(0, other.first), (other.stop, None)] if other.stop is not None else [(0, other.first)]
        pieces = [
            replace(piece, first=first, stop=stop)
            for piece in pieces
            for start, end in sides
            for first, stop in [(max(piece.first, start or 0), _least(piece.stop, end))]
            if stop is None or first < stop
        ]
    return pieces


def _least(one: int | None, two: int | None) -> int | None:
    return min((end for end in (one, two) if end is not None), default=None)
