"""Rows of a step over ranks: each row once, equal work, and every rank finds the same division."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lorafit.data.batch import RankShare, balance
from lorafit.data.packing import Packer

LENGTHS = st.lists(st.integers(2, 60), min_size=1, max_size=40)


class Numbered:
    """Row i has `lengths[i]` tokens, all of them i; the second half is trained, and so is the first token."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        length = self.lengths[index]
        trained = np.arange(length) >= length // 2
        trained[0] = True
        return np.full(length, index, dtype=np.uint16), trained


@given(LENGTHS, st.integers(1, 9), st.integers(8, 200))
def test_every_row_is_on_one_rank_once(lengths: list[int], world_size: int, capacity: int) -> None:
    rows, indices = Numbered(lengths), np.arange(len(lengths))
    batches = [
        RankShare(rank, world_size, 0.01).of(rows, indices, Packer(capacity)) for rank in range(world_size)
    ]
    packs = [pack for batch in batches for pack in batch.packs if pack.num_tokens]
    assert all(batch.packs for batch in batches)  # a rank without rows takes part
    targets = np.concatenate([pack.targets for pack in packs])
    expected = {index: int(rows.row(index)[1][1:].sum()) for index in range(len(lengths))}
    assert {index: int((targets == index).sum()) for index in range(len(lengths))} == expected
    for batch in batches:
        assert batch.supervised == len(targets)
        assert batch.tokens == sum(lengths)
        assert batch.imbalance == batches[0].imbalance >= 0


@given(LENGTHS, st.integers(1, 9))
def test_parts_are_as_equal_as_promised(costs: list[int], parts: int) -> None:
    found = balance(costs, parts)
    assert sorted(index for part in found for index in part) == list(range(len(costs)))
    least = max(sum(costs) / parts, max(costs))  # no division is better than that
    assert max(sum(costs[index] for index in part) for part in found) <= least * (4 / 3) + max(costs) / 3


def test_long_rows_count_for_their_attention_too() -> None:
    share = RankShare(0, 2, attention=0.1)
    assert share.cost(100) > 2 * share.cost(50)
    lengths = [100, 50, 50, 50, 50]
    alone = RankShare(0, 2, attention=0.1).of(Numbered(lengths), np.arange(5), Packer(1000))
    assert sum(pack.num_tokens for pack in alone.packs) == 100  # as much work as the four others


def test_a_step_without_rows_has_no_tokens_on_any_rank() -> None:
    for world_size in (1, 2):
        batch = RankShare(0, world_size).of(Numbered([3]), np.arange(0), Packer(10))
        assert (batch.tokens, batch.supervised, batch.weight) == (0, 0, 0)
        assert not any(pack.num_tokens for pack in batch.packs)
