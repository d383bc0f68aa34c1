"""The rows of each optimizer step: a pure function of the seed and the step, so that a resume is exact.

With ids, the place of a row is a function of its own id too: without a row, all others keep their order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorafit.data.row_ids import Hashes, mixed

Indices = NDArray[np.int64]
_HOLDOUT, _COPIES, _PART = 0x48, 0x4F, 0x50  # what a hash of ids is for


def split_holdout(
    num_rows: int, holdout: float, seed: int, ids: Hashes | None = None
) -> tuple[Indices, Indices]:
    """(training rows, held-out rows), each in file order: those with the lowest hashes of their `ids` are held out.

    `holdout` is a share below 1 or a number of rows; never more than a tenth of all is held out. Without `ids` the rows
    are drawn as in version 0.1.
    """
    count = round(num_rows * holdout) if holdout < 1 else int(holdout)
    if ids is None:
        drawn = np.random.default_rng([seed, _HOLDOUT]).permutation(num_rows)
    else:
        drawn = np.argsort(mixed(ids, seed, _HOLDOUT), kind="stable")
    is_held = np.zeros(num_rows, dtype=np.bool_)
    is_held[drawn[: min(count, num_rows // 10)]] = True
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


@dataclass(frozen=True, eq=False)
class RowOrder:
    """The order of an epoch and its cut into steps.

    `groups` are the row indices of each source, in file order. `weights` are the repetitions of each per epoch: 2 is
    twice, 0.5 is a random half, another one every epoch. A step has `batch_size` places; the last step of an epoch has
    the rest. `ids` has the id of each index, None for the order of version 0.1. Indices from `num_rows` on are of rows
    that are left out: they have places, which stay empty.
    """

    groups: Sequence[Indices]
    weights: Sequence[float]
    batch_size: int
    seed: int
    shuffle: bool
    ids: Hashes | None = None
    num_rows: int | None = None

    @property
    def rows_per_epoch(self) -> int:
        """Places per epoch with repetitions."""
        return sum(
            round(len(group) * weight) for group, weight in zip(self.groups, self.weights, strict=True)
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return math.ceil(self.rows_per_epoch / self.batch_size)

    def num_steps(self, epochs: float, max_steps: int | None) -> int:
        """Optimizer steps of the whole run."""
        return max_steps if max_steps is not None else math.ceil(epochs * self.steps_per_epoch)

    def places(self, step: int) -> Indices:
        """The indices of the places of step number `step` (from 0), also of rows that are left out."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return _epoch_rows(self, epoch)[within * self.batch_size : (within + 1) * self.batch_size]

    def rows(self, step: int) -> Indices:
        """Row indices of step number `step` (from 0)."""
        places = self.places(step)
        return places if self.num_rows is None else places[places < self.num_rows]

    def epoch_at(self, step: int) -> float:
        """Epochs after `step` steps."""
        return step / self.steps_per_epoch


@functools.lru_cache(maxsize=2)
def _epoch_rows(order: RowOrder, epoch: int) -> Indices:
    random = np.random.default_rng([order.seed, _COPIES, epoch])
    parts: list[Indices] = []
    keys: list[Hashes] = []
    for group, weight in zip(order.groups, order.weights, strict=True):
        copies, extra = divmod(round(len(group) * weight), len(group)) if len(group) else (0, 0)
        if order.ids is None:
            parts += [*[group] * copies, np.sort(random.permutation(group)[:extra])]
            continue
        ids = order.ids[group]
        some = np.sort(np.argsort(mixed(ids, order.seed, _PART, epoch), kind="stable")[:extra])
        for copy, part in enumerate([*[np.arange(len(group))] * copies, some]):
            parts.append(group[part])
            keys.append(mixed(ids[part], order.seed, _COPIES, epoch, copy))
    rows = np.concatenate(parts)
    if not order.shuffle:
        return rows
    if order.ids is not None:
        return rows[np.argsort(np.concatenate(keys), kind="stable")]
    random.shuffle(rows)  # in place: a copy of millions of rows takes memory
    return rows
