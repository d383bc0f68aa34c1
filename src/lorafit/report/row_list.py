"""What the losses of the visits say about each row: what became of it, and whether a person should look at it.

docs/rows.md explains the kinds, the thresholds and the order of the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lorafit.observe.answer_losses import AnswerLosses
from lorafit.observe.visits import Visits

Kind = Literal["learned", "known before", "never learned", "forgotten again", "memorised", "seen once"]
KNOWN = 0.3  # mean loss: each token has a probability of 74 % on average
MEMORISED = 0.1  # 90 %
LEARNED = 0.95  # of the loss of the first visit, as in evaluate/learned.py
FORGOTTEN = 0.5  # of what the loss had fallen by
LEAST_SPREAD = (
    1.0  # of the losses of like rows: where all are nearly equal, a small difference stands out in none
)
NEIGHBOURS = 50  # rows of like length that a row is compared with, on either side
Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RowStory:
    """A row over its visits: mean losses of its targets, and how far it stands out among rows of like length.

    `end` is the loss of the token that ends the answer, at the first visit. `score` is of the mean loss of this visit.
    With a second pass `asked` and `alone` are the base's losses of the answer with its question and without it, and the
    score is the share of the rows that `end`, or the difference of the two, puts below this one.
    """

    number: int
    kind: Kind
    visits: int
    first: float
    last: float
    lowest: float
    end: float
    tokens: int
    score: float
    reason: str
    asked: float | None = None
    alone: float | None = None


def stories(
    visits: Visits,
    tokens: NDArray[np.int64],
    pieces: NDArray[np.int64],
    since: int = 0,
    second: AnswerLosses | None = None,
) -> list[RowStory]:
    """The rows that were visited after step `since`, the most conspicuous first.

    `tokens` and `pieces` (rows of all sources,) are the supervised tokens of each row, and how many pieces it was split
    into: a visit of all pieces is one of the row. `second` are the losses of a second pass.
    """
    usable = (visits.steps > since) & np.isfinite(visits.losses) & (visits.rows < len(tokens))
    rows, losses, ends = visits.rows[usable], visits.losses[usable], np.nan_to_num(visits.ends[usable])
    if not len(rows):
        return []
    order = np.argsort(rows, kind="stable")
    rows, losses, ends = rows[order], losses[order], ends[order]
    starts = _starts(rows)
    nth = np.arange(len(rows)) - np.repeat(starts, np.diff(np.append(starts, len(rows))))
    passes = _starts(rows, nth // np.maximum(1, pieces[rows]))  # of which each is one visit of a whole row
    counts = np.diff(np.append(passes, len(rows)))
    losses, ends = (np.add.reduceat(values, passes) / counts for values in (losses, ends))
    rows = rows[passes]
    starts = _starts(rows)
    counts = np.diff(np.append(starts, len(rows)))
    stops = starts + counts - 1
    numbers, first, last, end = rows[starts], losses[starts], losses[stops], ends[starts]
    lowest = np.minimum.reduceat(losses, starts)
    length = tokens[numbers]
    apart, usual = outstanding(first, length)
    end_apart, usual_end = outstanding(end, length)
    listed = [
        RowStory(
            int(numbers[at]),
            kind_of(int(counts[at]), float(first[at]), float(last[at]), float(lowest[at])),
            int(counts[at]),
            round(float(first[at]), 4),
            round(float(last[at]), 4),
            round(float(lowest[at]), 4),
            round(float(end[at]), 4),
            int(length[at]),
            round(float(apart[at]), 2),
            _reason(
                (float(first[at]), float(usual[at]), float(apart[at])),
                (float(end[at]), float(usual_end[at]), float(end_apart[at])),
            ),
        )
        for at in range(len(numbers))
    ]
    if second is not None and len(second.rows):
        listed = _with_second_pass(listed, second)
    return sorted(listed, key=lambda story: (-story.score, story.number))


def _with_second_pass(listed: Sequence[RowStory], second: AnswerLosses) -> list[RowStory]:
    """The rows with the scores and reasons of a second pass, or as they are where it has not read all of them."""
    numbers = np.array([story.number for story in listed])
    at = np.searchsorted(second.rows, numbers).clip(max=len(second.rows) - 1)
    if not np.array_equal(second.rows[at], numbers):
        return [*listed]
    asked, alone, end = second.asked[at], second.alone[at], second.end[at]
    by_question, by_end = _share_below(asked - alone), _share_below(end)
    usual = float(np.median(end))
    return [
        replace(
            story,
            asked=round(float(asked[row]), 4),
            alone=None if np.isnan(alone[row]) else round(float(alone[row]), 4),
            end=round(float(end[row]), 4),
            score=round(float(max(by_question[row], by_end[row])), 4),
            reason=f"the question helps the answer little: loss {asked[row]:.2f} with it, {alone[row]:.2f} without it"
            if by_question[row] > by_end[row]
            else _early_end(float(end[row]), usual, "all rows"),
        )
        for row, story in enumerate(listed)
    ]


def _share_below(values: Values) -> Values:
    """Of each value the share of the values below it; 0 for what is not a number."""
    known = np.nan_to_num(values, nan=-np.inf, posinf=np.inf)
    return np.searchsorted(np.sort(known), known) / len(values)


def kind_of(visits: int, first: float, last: float, lowest: float) -> Kind:
    """What became of a row, by the mean losses of its first, its last and its best visit."""
    if first <= KNOWN:
        return "known before"
    if visits < 2:
        return "seen once"
    if lowest <= LEARNED * first and last - lowest >= FORGOTTEN * (first - lowest):
        return "forgotten again"
    if last <= MEMORISED:
        return "memorised"
    return "learned" if last <= LEARNED * first else "never learned"


def outstanding(values: Values, lengths: NDArray[np.int64]) -> tuple[Values, Values]:
    """(how many robust standard deviations each of `values` lies above those of rows of like length, their median)."""
    order = np.argsort(lengths, kind="stable")
    apart, usual = np.empty(len(values)), np.empty(len(values))
    ordered = values[order]
    width = min(len(values), 2 * NEIGHBOURS + 1)
    windows = np.lib.stride_tricks.sliding_window_view(ordered, width)
    middles = np.median(windows, axis=1)
    spreads = np.median(np.abs(windows - middles[:, None]), axis=1)
    window = np.clip(np.arange(len(values)) - NEIGHBOURS, 0, len(windows) - 1)
    usual[order] = middles[window]
    apart[order] = robust_deviations(ordered - middles[window], spreads[window])
    return apart, usual


def robust_deviations(above: Values, spread: Values) -> Values:
    """Distances from a median in robust standard deviations. `spread` is the median absolute deviation.

    Iglewicz and Hoaglin, How to Detect and Handle Outliers (1993): beyond 3.5 a value is an outlier.
    """
    return 0.6745 * above / np.maximum(spread, LEAST_SPREAD)


def counts_of(listed: Sequence[RowStory]) -> dict[str, int]:
    """The number of rows of each kind."""
    kinds: tuple[Kind, ...] = Kind.__args__  # type: ignore[attr-defined]
    return {kind: sum(story.kind == kind for story in listed) for kind in kinds}


def _reason(loss: tuple[float, float, float], end: tuple[float, float, float]) -> str:
    """What of a row stands out more, its loss or its end."""
    if end[2] > loss[2]:
        return _early_end(end[0], end[1], "like rows")
    return (
        f"the answer is unlikely after its question: loss {loss[0]:.2f}, {loss[1]:.2f} in rows of like length"
    )


def _early_end(end: float, usual: float, rows: str) -> str:
    return f"the answer ends where no end is likely: loss of its end {end:.2f}, {usual:.2f} in {rows}"


def _starts(*columns: NDArray[np.int64]) -> NDArray[np.intp]:
    """Where the values of `columns` (n,) change, and 0."""
    changes = np.zeros(len(columns[0]), np.bool_)
    changes[:1] = True
    for column in columns:
        changes[1:] |= column[1:] != column[:-1]
    return np.flatnonzero(changes)
