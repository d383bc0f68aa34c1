"""The rows of one optimizer step: spread over the ranks, all with about the same work, and laid out in passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lorafit.data.packing import BLANK, Pack, TokenRow, make_packs, num_packs, spread
from lorafit.model.architecture import Architecture


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


def attention_cost(arch: Architecture) -> float:
    """What a pair of tokens of one row costs beside one token: the multiplications of causal attention beside those
    of all weights.
    """
    heads = arch.num_attention_heads * arch.head_dim
    keys = arch.num_key_value_heads * arch.head_dim
    layer = arch.hidden_size * (2 * heads + 2 * keys + 3 * arch.intermediate_size)
    weights = arch.num_hidden_layers * layer + arch.hidden_size * arch.vocab_size
    return arch.num_hidden_layers * heads / weights


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of each step is this rank's. `attention` is what a pair of tokens costs, a token costs 1.

    With `lockstep` all ranks get equally many passes. A rank always has one, if only a blank one.
    """

    rank: int = 0
    world_size: int = 1
    attention: float = 0.0
    lockstep: bool = False

    def of(self, rows: Rows, indices: NDArray[np.int64], capacity: int, packing: bool) -> Batch:
        """The step of the rows at `indices`; every rank finds the same division by itself."""
        if self.world_size == 1:
            packs = make_packs([rows.row(index) for index in indices], capacity, packing)
            counts = (sum(pack.num_tokens for pack in packs), sum(len(pack.targets) for pack in packs))
            return Batch(indices, packs, *counts, imbalance=0.0)
        found = [rows.row(index) for index in indices]
        lengths = [len(ids) for ids, _ in found]
        costs = [self.cost(length) for length in lengths]
        shares = spread(costs, self.world_size)
        loads = [sum(costs[at] for at in members) for members in shares]
        own = shares[self.rank]
        packs = make_packs([found[at] for at in own], capacity, packing)
        rounds = 1
        if self.lockstep:
            rounds = max(num_packs([lengths[at] for at in members], capacity, packing) for members in shares)
        return Batch(
            indices,
            packs + [BLANK] * (rounds - len(packs)),
            tokens=sum(lengths),
            supervised=sum(int(np.count_nonzero(trained[1:])) for _, trained in found),
            imbalance=max(loads) * self.world_size / sum(loads) - 1,
        )

    def cost(self, length: int) -> float:
        """What a row of `length` tokens costs beside others: its tokens, and its pairs of tokens for attention."""
        return length + self.attention * length * length
