"""All rows rendered, fitted to the longest length allowed, and laid end to end in flat arrays."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorafit.data.formats import Row
from lorafit.data.template import Dropped, Rendered, Renderer
from lorafit.errors import DataError, Problem

_CHUNK = 2048  # rows encoded at a time: enough for all cores, and the Python lists stay small
_NUM_LISTED = 5  # too long rows that an error names one by one


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Rows as tokens: row i is `ids[offsets[i]:offsets[i + 1]]`, `trained` says which are training targets.

    `numbers` are the rows' numbers, `truncated` how many tokens each row lost, `dropped` the numbers of the
    rows that are not here, by reason.
    """

    ids: NDArray[np.uint32]  # (tokens,)
    trained: NDArray[np.bool_]  # (tokens,)
    offsets: NDArray[np.int64]  # (rows + 1,)
    numbers: NDArray[np.int64]  # (rows,)
    truncated: NDArray[np.int64]  # (rows,)
    dropped: dict[str, list[int]]

    def __len__(self) -> int:
        return len(self.numbers)

    def row(self, index: int) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        """The ids of the row at `index` and which of them are trained, as views."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        return self.ids[span], self.trained[span]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        return np.diff(self.offsets)

    def take(self, indices: NDArray[np.int64]) -> Encoded:
        """The rows at `indices`, in that order, without any dropped rows."""
        lengths = self.lengths[indices]
        offsets = _offsets(lengths)
        tokens = np.arange(offsets[-1]) + np.repeat(self.offsets[indices] - offsets[:-1], lengths)
        return Encoded(
            self.ids[tokens],
            self.trained[tokens],
            offsets,
            self.numbers[indices],
            self.truncated[indices],
            {},
        )


def encode_rows(
    rows: Sequence[Row], renderer: Renderer, progress: Callable[[int, int], None] | None = None
) -> Encoded:
    """Renders all `rows` and applies the contract's `max_length` and `too_long`.

    `progress` is told (rows done, rows in all). Raises DataError with the problems of all rows.
    """
    contract = renderer.contract
    ids: list[NDArray[np.uint32]] = []
    trained: list[NDArray[np.bool_]] = []
    lengths: list[int] = []
    kept: list[tuple[int, int]] = []  # row number, truncated tokens
    dropped: defaultdict[str, list[int]] = defaultdict(list)
    problems: list[Problem] = []
    too_long: list[tuple[Row, int]] = []
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        fitting: list[Rendered] = []
        for row, outcome in zip(chunk, renderer.render_batch(chunk), strict=True):
            if isinstance(outcome, Problem):
                problems.append(outcome)
                continue
            if isinstance(outcome, Dropped):
                dropped[outcome.reason].append(row.number)
                continue
            length = len(outcome.ids)
            if length > contract.max_length:
                if contract.too_long == "error":
                    too_long.append((row, length))
                    continue
                if contract.too_long == "drop":
                    dropped[f"longer than {contract.max_length} tokens"].append(row.number)
                    continue
                outcome = Rendered(outcome.ids[: contract.max_length], outcome.trained[: contract.max_length])
            if not any(outcome.trained):
                dropped[f"nothing to train on in the first {contract.max_length} tokens"].append(row.number)
                continue
            fitting.append(outcome)
            lengths.append(len(outcome.ids))
            kept.append((row.number, length - len(outcome.ids)))
        # Through `array` and `bytes`: several times faster than numpy on lists of millions of tokens.
        flat = b"".join(array("I", row.ids).tobytes() for row in fitting)
        ids.append(np.frombuffer(flat, dtype=np.uint32))
        trained.append(np.frombuffer(b"".join(bytes(row.trained) for row in fitting), dtype=np.bool_))
        if progress:
            progress(start + len(chunk), len(rows))
    problems += _too_long(too_long, contract.max_length)
    if problems:
        raise DataError.of(problems)
    numbers, truncated = np.array(kept, dtype=np.int64).reshape(-1, 2).T
    empty = [np.array([], dtype=np.uint32)], [np.array([], dtype=np.bool_)]
    return Encoded(
        np.concatenate(ids or empty[0]),
        np.concatenate(trained or empty[1]),
        _offsets(np.array(lengths, dtype=np.int64)),
        numbers,
        truncated,
        dict(dropped),
    )


def _offsets(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _too_long(rows: Sequence[tuple[Row, int]], max_length: int) -> list[Problem]:
    """One problem that counts the rows that are too long, then the first of them by name."""
    if not rows:
        return []
    longest = max(length for _, length in rows)
    hint = (
        f"data.max_length={longest} keeps them whole; data.too_long=truncate cuts them, "
        "data.too_long=drop leaves them out"
    )
    summary = (
        f"{len(rows):,} rows are longer than data.max_length={max_length}; the longest has {longest:,} tokens"
    )
    listed = [Problem(f"has {length:,} tokens", row.place) for row, length in rows[:_NUM_LISTED]]
    return [*listed, Problem(summary, "data.max_length", hint)]
