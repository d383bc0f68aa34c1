"""What a run will work through: its exact tokens, and what each of its passes holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorafit.data.packing import Pack, best_fit
from lorafit.data.row_order import RowOrder
from lorafit.plan.cost_model import PassCost

_SAMPLED_STEPS = 2000  # of longer runs so many steps, evenly spread, stand for all: packing takes its time
_SAMPLED_PACKS = 250  # of more packs so many are laid out, to see what their rows share

PackFn = Callable[[Sequence[int]], Pack]  # the pack of the rows at these indices


@dataclass(frozen=True, slots=True)
class Workload:
    """All passes of a run, or evenly spread ones of which each stands for `weight`.

    Token counts are exact. A pass is what formula.Pass holds, a column each; `pack_of` are the rows of each pass as
    indices. `shared` are the tokens of the run that are computed once for several rows, about.
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
    shared: float

    @property
    def num_passes(self) -> int:
        """Passes of the whole run."""
        return round(len(self.passes) * self.weight)

    def at(self, index: int) -> PassCost:
        """One pass."""
        return PassCost(*map(float, self.passes[index]))

    @property
    def mean(self) -> PassCost:
        """A pass that costs the mean: costs are linear in what a pass holds."""
        return PassCost(*map(float, self.passes.mean(axis=0)))


def estimate_workload(
    lengths: NDArray[np.integer[Any]],
    targets: NDArray[np.integer[Any]],
    order: RowOrder,
    num_steps: int,
    capacity: int,
    packing: bool,
    lay: PackFn | None = None,
) -> Workload:
    """The workload of `num_steps` steps over rows of `lengths` tokens of which `targets` are supervised.

    What rows share where they begin alike is counted once, as far as `lay` shows it.
    """
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
    pack_of: list[tuple[int, ...]] = []
    most = 0
    for step in steps:
        rows = order.rows(step)
        bins = best_fit(lengths[rows].tolist(), capacity) if packing else [[at] for at in range(len(rows))]
        most = max(most, len(bins))
        pack_of += [tuple(rows[members].tolist()) for members in bins]
    passes, shared = _passes(pack_of, lengths, targets, lay)
    weight = num_steps / len(steps)
    return Workload(
        steps=num_steps,
        rows_per_epoch=order.rows_per_epoch,
        tokens_per_epoch=int(lengths[first].sum(dtype=np.int64)),
        supervised_per_epoch=int(targets[first].sum(dtype=np.int64)),
        tokens=tokens,
        supervised=supervised,
        passes=passes,
        pack_of=pack_of,
        weight=weight,
        most_in_a_step=most,
        longest_row=int(lengths.max()),
        shared=shared * weight,
    )


def heldout_passes(
    lengths: NDArray[np.integer[Any]],
    targets: NDArray[np.integer[Any]],
    capacity: int,
    packing: bool,
    lay: PackFn | None = None,
) -> list[PassCost]:
    """The passes of one held-out measurement."""
    bins = best_fit(lengths.tolist(), capacity) if packing else [[at] for at in range(len(lengths))]
    return [PassCost(*map(float, one)) for one in _passes(bins, lengths, targets, lay)[0]]


def _passes(
    pack_of: Sequence[Sequence[int]],
    lengths: NDArray[np.integer[Any]],
    targets: NDArray[np.integer[Any]],
    lay: PackFn | None,
) -> tuple[NDArray[np.float64], float]:
    """The passes of these packs, (packs, 3), and how many tokens their rows share.

    Where there are many some are laid out, and of the others each row but the first is taken to share as much as
    those rows do on average.
    """
    passes = np.empty((len(pack_of), 3))
    for at, members in enumerate(pack_of):
        inputs = lengths[list(members)].astype(np.float64) - 1  # the last token is a target only
        passes[at] = inputs.sum(), targets[list(members)].sum(), np.square(inputs).sum()
    several = [at for at, members in enumerate(pack_of) if len(members) > 1]
    if lay is None or not several:
        return passes, 0.0
    others = np.array([len(members) - 1.0 for members in pack_of])
    laid = [several[number] for number in _spread(len(several), _SAMPLED_PACKS)]
    exact = np.array([_pass_of(lay(pack_of[at])) for at in laid])
    of_a_row = (passes[laid] - exact).sum(axis=0) / others[laid].sum()
    without = float(passes[:, 0].sum())
    passes -= others[:, None] * of_a_row * [1, 0, 1]
    passes[laid] = exact
    return passes, without - float(passes[:, 0].sum())


def _pass_of(pack: Pack) -> tuple[int, int, int]:
    """What formula.Pass holds: of documents that begin alike, only the first sees its tokens up to where they part."""
    positions = np.concatenate([np.arange(length) for length in pack.lengths])
    first = np.unique(pack.index, return_index=True)[1]
    return len(pack.ids), len(pack.targets), int((2 * positions[first] + 1).sum())


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of 0 ... count - 1, evenly spread."""
    return list(range(count)) if count <= most else [index * count // most for index in range(most)]
