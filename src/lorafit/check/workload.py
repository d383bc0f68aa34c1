"""What a run will work through: its exact tokens, and what each of its passes holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorafit.check.formula import Pass
from lorafit.data.loader import RowOrder
from lorafit.data.packing import best_fit

_SAMPLED_STEPS = 2000  # of longer runs so many steps, evenly spread, stand for all: packing takes its time


@dataclass(frozen=True, slots=True)
class Workload:
    """All passes of a run, or evenly spread ones of which each stands for `weight`.

    Token counts are exact. A pass is (tokens, supervised tokens, sum of squared lengths), a column each;
    `pack_of` are the rows of each pass as indices.
    """

    steps: int
    rows_per_epoch: int
    tokens_per_epoch: int
    supervised_per_epoch: int
    tokens: int
    supervised: int
    passes: NDArray[np.float64]  # (passes, 3)
    pack_of: Sequence[tuple[int, ...]]
    weight: float
    most_in_a_step: int
    longest_row: int

    @property
    def num_passes(self) -> int:
        """Passes of the whole run."""
        return round(len(self.passes) * self.weight)

    def at(self, index: int) -> Pass:
        """One pass."""
        return Pass(*map(float, self.passes[index]))

    @property
    def mean(self) -> Pass:
        """A pass that costs the mean: costs are linear in what a pass holds."""
        return Pass(*map(float, self.passes.mean(axis=0)))


def survey(
    lengths: NDArray[np.integer[Any]],
    targets: NDArray[np.integer[Any]],
    order: RowOrder,
    num_steps: int,
    capacity: int,
    packing: bool,
) -> Workload:
    """The workload of `num_steps` steps over rows of `lengths` tokens of which `targets` are supervised."""
    of_epoch = replace(order, batch_size=order.rows_per_epoch)  # the same order, an epoch in one piece
    tokens = supervised = 0
    left = num_steps
    for epoch in range(-(-num_steps // order.steps_per_epoch)):
        rows = of_epoch.rows(epoch)[: left * order.batch_size]
        left -= order.steps_per_epoch
        tokens += int(lengths[rows].sum(dtype=np.int64))
        supervised += int(targets[rows].sum(dtype=np.int64))
    first = of_epoch.rows(0)
    steps = _spread(num_steps, _SAMPLED_STEPS)
    passes: list[tuple[float, float, float]] = []
    pack_of: list[tuple[int, ...]] = []
    most = 0
    for step in steps:
        rows = order.rows(step)
        bins = best_fit(lengths[rows].tolist(), capacity) if packing else [[at] for at in range(len(rows))]
        most = max(most, len(bins))
        for members in bins:
            chosen = rows[members]
            inputs = lengths[chosen].astype(np.float64) - 1  # the last token is a target only
            passes.append((float(inputs.sum()), float(targets[chosen].sum()), float(np.square(inputs).sum())))
            pack_of.append(tuple(chosen.tolist()))
    return Workload(
        steps=num_steps,
        rows_per_epoch=order.rows_per_epoch,
        tokens_per_epoch=int(lengths[first].sum(dtype=np.int64)),
        supervised_per_epoch=int(targets[first].sum(dtype=np.int64)),
        tokens=tokens,
        supervised=supervised,
        passes=np.array(passes, dtype=np.float64),
        pack_of=pack_of,
        weight=num_steps / len(steps),
        most_in_a_step=most,
        longest_row=int(lengths.max()),
    )


def heldout_passes(
    lengths: NDArray[np.integer[Any]], targets: NDArray[np.integer[Any]], capacity: int, packing: bool
) -> list[Pass]:
    """The passes of one held-out measurement."""
    bins = best_fit(lengths.tolist(), capacity) if packing else [[at] for at in range(len(lengths))]
    inputs = lengths.astype(np.float64) - 1
    return [
        Pass(float(inputs[b].sum()), float(targets[b].sum()), float(np.square(inputs[b]).sum())) for b in bins
    ]


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of 0 ... count - 1, evenly spread."""
    return list(range(count)) if count <= most else [index * count // most for index in range(most)]
