"""The rows of one optimizer step: spread over the ranks, all with about the same work, and laid out in passes."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lorafit.data.packing import EMPTY_PACK, Pack, Packer, TokenRow


class Rows(Protocol):
    """Tokenised rows by index."""

    def row(self, index: int) -> TokenRow: ...


@dataclass(frozen=True, slots=True)
class Batch:
    """A step: all its rows with their tokens and targets, and the `packs` of this rank alone.

    `imbalance` is how much more the busiest rank computes than the mean, 0.05 for 5 %.
    """

    indices: NDArray[np.int64]
    packs: Sequence[Pack]
    tokens: int
    supervised: int
    imbalance: float


@dataclass(frozen=True, slots=True)
class RankShare:
    """Which part of each step is this rank's. `attention` is what a pair of tokens costs, a token costs 1.

    With `lockstep` all ranks get equally many passes. A rank always has one, if only a blank one.
    """

    rank: int = 0
    world_size: int = 1
    attention: float = 0.0
    lockstep: bool = False

    def of(self, rows: Rows, indices: NDArray[np.int64], packer: Packer) -> Batch:
        """The step of the rows at `indices`; every rank finds the same division by itself."""
        if self.world_size == 1:
            packs = packer.packs([rows.row(index) for index in indices])
            counts = (sum(pack.num_tokens for pack in packs), sum(len(pack.targets) for pack in packs))
            return Batch(indices, packs, *counts, imbalance=0.0)
        found = [rows.row(index) for index in indices]
        lengths = [len(ids) for ids, _ in found]
        costs = [self.cost(length) for length in lengths]
        shares = balance(costs, self.world_size)
        loads = [sum(costs[at] for at in members) for members in shares]
        own = shares[self.rank]
        packs = packer.packs([found[at] for at in own])
        rounds = 1
        if self.lockstep:
            rounds = max(packer.count([lengths[at] for at in members]) for members in shares)
        return Batch(
            indices,
            packs + [EMPTY_PACK] * (rounds - len(packs)),
            tokens=sum(lengths),
            supervised=sum(int(np.count_nonzero(trained[1:])) for _, trained in found),
            imbalance=max(loads) * self.world_size / sum(loads) - 1,
        )

    def cost(self, length: int) -> float:
        """What a row of `length` tokens costs beside others: its tokens, and its pairs of tokens for attention."""
        return length + self.attention * length * length


def balance(costs: Sequence[float], parts: int) -> list[list[int]]:
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
