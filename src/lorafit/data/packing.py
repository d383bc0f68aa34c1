"""Rows of one optimizer step laid end to end into as few passes as fit: no padding, exact document borders."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.uint16] | NDArray[np.uint32]
TokenRow = tuple[Ids, NDArray[np.bool_]]  # ids and which of them are trained, one row


@dataclass(frozen=True, slots=True)
class Pack:
    """The arrays of one forward pass.

    `ids` (tokens,) are the inputs, `lengths` the documents' token counts in order, `predict` (targets,) the
    positions whose next token is supervised, `targets` (targets,) those next tokens. A row's last trained token
    is a target only, so it and what follows it are no inputs: `num_tokens` counts the rows' tokens in full.
    `slots` are the documents' numbers among the rows that were given.
    """

    ids: NDArray[np.int64]
    lengths: tuple[int, ...]
    predict: NDArray[np.int64]
    targets: NDArray[np.int64]
    num_tokens: int
    slots: tuple[int, ...] = ()


# What a process without rows of its own computes in order to take part: its tokens and targets count for nothing.
BLANK = Pack(np.zeros(1, np.int64), (1,), np.zeros(1, np.int64), np.zeros(1, np.int64), num_tokens=0)


def make_packs(
    rows: Sequence[TokenRow], capacity: int, packing: bool = True, slots: Sequence[int] | None = None
) -> list[Pack]:
    """Packs of at most `capacity` tokens that hold every row once; a longer row gets a pack of its own.

    Without `packing` each row is a pack. How rows are laid out never changes the sum of the losses. `slots` are the
    rows' numbers where they are only some of more.
    """
    lengths = [len(ids) for ids, _ in rows]
    bins = best_fit(lengths, capacity) if packing else [[index] for index in range(len(rows))]
    numbers = range(len(rows)) if slots is None else slots
    return [_lay([(rows[i], numbers[i]) for i in members]) for members in bins]


def num_packs(lengths: Sequence[int], capacity: int, packing: bool = True) -> int:
    """How many packs `make_packs` makes of rows of `lengths` tokens."""
    return len(best_fit(lengths, capacity)) if packing else len(lengths)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in bins of at most `capacity`: best-fit decreasing, ties in order, deterministic."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [b for b, left in enumerate(room) if left >= lengths[index]]
        if fitting:
            best = min(fitting, key=lambda b: (room[b], b))
            bins[best].append(index)
            room[best] -= lengths[index]
        else:
            bins.append([index])
            room.append(capacity - lengths[index])
    return bins


def _lay(rows: Sequence[tuple[TokenRow, int]]) -> Pack:
    inputs, lengths, predict, targets = [], [], [], []
    at = num_tokens = 0
    for (ids, trained), _ in rows:
        # The first token has nothing before it to predict it from.
        target_at = trained[1:].nonzero()[0] + 1
        length = int(target_at[-1]) if len(target_at) else len(ids)
        inputs.append(ids[:length])
        predict.append(at + target_at - 1)
        targets.append(ids[target_at])
        lengths.append(length)
        at += length
        num_tokens += len(ids)
    return Pack(
        np.concatenate(inputs, dtype=np.int64),
        tuple(lengths),
        np.concatenate(predict),
        np.concatenate(targets, dtype=np.int64),
        num_tokens,
        tuple(slot for _, slot in rows),
    )


def spread(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Indices of `costs` in `parts` lists of about the same sum, each ascending; deterministic.

    The costliest goes to the part with the least so far (Graham, 1969): at most a third above the best division, and
    near it where there are many.
    """
    heap = [(0.0, part) for part in range(parts)]
    found: list[list[int]] = [[] for _ in range(parts)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, part = heapq.heappop(heap)
        found[part].append(index)
        heapq.heappush(heap, (load + costs[index], part))
    return [sorted(part) for part in found]
