"""The rows of an optimizer step: divided over the ranks by equal cost, and packed into passes."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lorafit.data.packing import EMPTY_PACK, Pack, Packer, TokenRow
from lorafit.data.pair_marks import SUPERVISED, marks_of


class Rows(Protocol):
    """Tokenised rows by index."""

    def row(self, index: int) -> TokenRow: ...


@dataclass(frozen=True, slots=True)
class Batch:
    """A step: the counts of all its rows, and the `packs` of this rank. `weight` is the sum of the weights of all
    supervised tokens, by which the sum of their losses is divided; of preferences it is their number.

    The `rows` of a pack are indices of `indices`.

    `imbalance` is the cost of the busiest rank over the mean, minus 1: 0.05 is 5 % more.
    """

    indices: NDArray[np.int64]
    packs: Sequence[Pack]
    tokens: int
    supervised: int
    imbalance: float
    weight: float


@dataclass(frozen=True, slots=True)
class RankShare:
    """The part of each step that this rank computes. A pair of tokens costs `attention`, a token costs 1.

    With `lockstep` all ranks get the same number of passes. A rank has at least one pass, an empty one if need be.
    """

    rank: int = 0
    world_size: int = 1
    attention: float = 0.0
    lockstep: bool = False

    def of(self, rows: Rows, indices: NDArray[np.int64], packer: Packer) -> Batch:
        """The step of the rows at `indices`. Every rank computes the same division without communication."""
        if self.world_size == 1:
            packs = packer.packs([rows.row(index) for index in indices])
            counts = (sum(pack.num_tokens for pack in packs), sum(len(pack.targets) for pack in packs))
            return Batch(indices, packs, *counts, 0.0, sum(pack.weight for pack in packs))
        step_rows = [rows.row(index) for index in indices]
        lengths = [len(ids) for ids, _ in step_rows]
        marked = any(trained.dtype == np.uint8 for _, trained in step_rows)
        costs = [self.cost(length) for length in lengths]
        shares = balance(costs, self.world_size)
        loads = [sum(costs[at] for at in members) for members in shares]
        own = shares[self.rank]
        packs = packer.packs([step_rows[at] for at in own], own)
        rounds = 1
        if self.lockstep:
            rounds = max(packer.count([lengths[at] for at in members]) for members in shares)
        return Batch(
            indices,
            packs + [EMPTY_PACK] * (rounds - len(packs)),
            tokens=sum(lengths),
            supervised=sum(
                int(np.count_nonzero(marks_of(trained) & SUPERVISED if marked else trained[1:]))
                for _, trained in step_rows
            ),
            imbalance=max(loads) * self.world_size / (sum(loads) or 1) - 1,
            weight=float(len(step_rows))
            if marked
            else sum(float(trained[1:].sum(dtype=np.float64)) for _, trained in step_rows),
        )

    def cost(self, length: int) -> float:
        """The relative cost of a row of `length` tokens: its tokens, and its pairs of tokens for attention."""
        return length + self.attention * length * length


def balance(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Indices of `costs` in `parts` lists of about the same sum, each ascending; deterministic.

    The most costly one left goes to the part with the least so far (Graham, 1969). The largest part is at most a third
    above the optimum, and near it for many items.
    """
    heap = [(0.0, part) for part in range(parts)]
    divided: list[list[int]] = [[] for _ in range(parts)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, part = heapq.heappop(heap)
        divided[part].append(index)
        heapq.heappush(heap, (load + costs[index], part))
    return [sorted(part) for part in divided]
