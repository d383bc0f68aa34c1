"""What a run computes: its exact token counts, and the size of each of its passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lorafit.data.packing import Pack, Packer, build_pack
from lorafit.data.row_order import RowOrder
from lorafit.data.token_dataset import TokenDataset
from lorafit.model.places import GROUP
from lorafit.plan.cost_model import PassCost

_SAMPLED_STEPS = 2000  # evenly spread steps of a longer run stand for all of it, because packing takes time
_SAMPLED_PACKS = 250  # of more packs so many are built, to see what their rows share


@dataclass(frozen=True, slots=True)
class Workload:
    """All passes of a run, or evenly spread ones that each stand for `weight` passes.

    Token counts are exact. `passes` are the numbers of a PassCost; `pack_of` are the rows of each
    pass as indices. `shared` estimates the tokens of shared prefixes, which are computed once for several rows.
    """

    steps: int
    tokens_per_epoch: int
    supervised_per_epoch: int
    tokens: int
    supervised: int
    passes: NDArray[np.float64]  # (passes, 4)
    pack_of: Sequence[tuple[int, ...]]
    weight: float
    most_in_a_step: int
    longest_row: int
    shared: float

    @property
    def num_passes(self) -> int:
        """Passes of the whole run."""
        return round(len(self.passes) * self.weight)

    @property
    def computed_tokens(self) -> float:
        """Input tokens of all passes of the run."""
        return float(self.passes[:, 0].sum()) * self.weight

    def at(self, index: int) -> PassCost:
        """One pass."""
        return PassCost(*map(float, self.passes[index]))


def estimate_workload(rows: TokenDataset, order: RowOrder, num_steps: int, packer: Packer) -> Workload:
    """The workload of `num_steps` steps over `rows`."""
    lengths, targets = rows.lengths, rows.targets
    of_epoch = replace(order, batch_size=order.rows_per_epoch)  # the same order, one step per epoch
    tokens = supervised = 0
    left = num_steps
    for epoch in range(-(-num_steps // order.steps_per_epoch)):
        members = of_epoch.rows(epoch)[: left * order.batch_size]
        left -= order.steps_per_epoch
        tokens += int(lengths[members].sum(dtype=np.int64))
        supervised += int(targets[members].sum(dtype=np.int64))
    first = of_epoch.rows(0)
    steps = evenly_spread(num_steps, _SAMPLED_STEPS)
    pack_of: list[tuple[int, ...]] = []
    most = 0
    for step in steps:
        members = order.rows(step)
        bins = packer.bins(lengths[members].tolist())
        most = max(most, len(bins))
        pack_of += [tuple(members[positions].tolist()) for positions in bins]
    passes, shared = _passes(pack_of, rows, packer.may_share)
    weight = num_steps / len(steps)
    return Workload(
        steps=num_steps,
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


def heldout_tokens(rows: TokenDataset, packer: Packer) -> float:
    """Input tokens of one held-out measurement."""
    return float(_passes(packer.bins(rows.lengths.tolist()), rows, packer.may_share)[0][:, 0].sum())


def pack_of_rows(rows: TokenDataset, members: Sequence[int]) -> Pack:
    """The rows at `members` as one pack."""
    stored = rows.to_pack
    return build_pack([stored.row(index) for index in members])


def evenly_spread(count: int, most: int) -> list[int]:
    """At most `most` of 0 ... count - 1, evenly spread."""
    return list(range(count)) if count <= most else [index * count // most for index in range(most)]


def _passes(
    pack_of: Sequence[Sequence[int]], rows: TokenDataset, may_share: bool
) -> tuple[NDArray[np.float64], float]:
    """The passes of these packs, (packs, 4), and how many tokens their rows share.

    Of many packs only some are built. In the others each row but the first is expected to share the mean of those.
    """
    lengths, targets = rows.lengths, rows.targets
    passes = np.zeros((len(pack_of), 4))
    for index, members in enumerate(pack_of):
        chosen = list(members)
        inputs = lengths[chosen] - 1  # the last token is a target only
        passes[index] = inputs.sum(), targets[chosen].sum(), 0, (-inputs % GROUP).sum()
    several = [index for index, members in enumerate(pack_of) if len(members) > 1]
    if not several or not may_share:
        return passes, 0.0
    built = [several[number] for number in evenly_spread(len(several), _SAMPLED_PACKS)]
    exact = np.array([len(pack_of_rows(rows, pack_of[index]).ids) for index in built])
    others = np.array([len(members) - 1.0 for members in pack_of])
    shared_per_row = (passes[built, 0] - exact).sum() / others[built].sum()
    before = passes[:, 0].copy()
    passes[:, 0] -= others * shared_per_row
    passes[built, 0] = exact
    passes[:, 2] = before - passes[:, 0]
    return passes, float(passes[:, 2].sum())
