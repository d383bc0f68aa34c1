"""The rows of each optimizer step: a pure function of the seed and the step, so that a resume is exact."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


def split_holdout(num_rows: int, holdout: float, seed: int) -> tuple[Indices, Indices]:
    """(training rows, held-out rows), each in file order.

    `holdout` is a share below 1 or a number of rows; never more than a tenth of all is held out.
    """
    count = round(num_rows * holdout) if holdout < 1 else int(holdout)
    held = np.random.default_rng([seed, 0x48]).permutation(num_rows)[: min(count, num_rows // 10)]
    is_held = np.zeros(num_rows, dtype=np.bool_)
    is_held[held] = True
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


@dataclass(frozen=True, eq=False)
class RowOrder:
    """The order of an epoch and its cut into steps.

    `groups` are the row indices of each source. `weights` are the repetitions of each per epoch: 2 is twice, 0.5 is a
    random half, another one every epoch. A step has `batch_size` rows; the last step of an epoch has the rest.
    """

    groups: Sequence[Indices]
    weights: Sequence[float]
    batch_size: int
    seed: int
    shuffle: bool

    @property
    def rows_per_epoch(self) -> int:
        """Rows per epoch with repetitions."""
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

    def rows(self, step: int) -> Indices:
        """Row indices of step number `step` (from 0)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return _epoch_rows(self, epoch)[within * self.batch_size : (within + 1) * self.batch_size]

    def epoch_at(self, step: int) -> float:
        """Epochs after `step` steps."""
        return step / self.steps_per_epoch


@functools.lru_cache(maxsize=2)
def _epoch_rows(order: RowOrder, epoch: int) -> Indices:
    random = np.random.default_rng([order.seed, 0x4F, epoch])
    parts = []
    for group, weight in zip(order.groups, order.weights, strict=True):
        copies, extra = divmod(round(len(group) * weight), len(group)) if len(group) else (0, 0)
        parts += [group] * copies
        parts.append(np.sort(random.permutation(group)[:extra]))
    rows = np.concatenate(parts)
    if order.shuffle:
        random.shuffle(rows)  # in place: a copy of millions of rows takes memory
    return rows
