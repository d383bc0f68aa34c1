"""Rows have their places by their own ids: without some, the others keep their steps and their side of the split."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lorafit.data.row_ids import mixed, occurrences
from lorafit.data.row_order import RowOrder, split_holdout

SETS = st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=40, unique=True)


def order(
    ids: list[int], counts: list[int], weights: list[float], gone: int = 0, shuffle: bool = True
) -> RowOrder:
    groups = [np.arange(start, end) for start, end in pairwise(np.cumsum([0, *counts]))]
    return RowOrder(groups, weights, 4, 7, shuffle, np.array(ids, np.uint64), len(ids) - gone)


@given(ids=SETS, data=st.data())
def test_rows_that_are_left_out_leave_gaps_only(ids: list[int], data: st.DataObject) -> None:
    gone = data.draw(st.sets(st.sampled_from(ids), max_size=len(ids) - 1))
    kept = [one for one in ids if one not in gone]
    weight = data.draw(st.sampled_from([1.0, 0.5, 2.5]))
    whole = order(ids, [len(ids)], [weight])
    fewer = order([*kept, *gone], [len(ids)], [weight], len(gone))
    for step in range(3 * whole.steps_per_epoch):
        left = [ids[row] for row in whole.rows(step).tolist() if ids[row] not in gone]
        assert [kept[row] for row in fewer.rows(step).tolist()] == left


@given(ids=SETS, data=st.data())
def test_an_epoch_has_each_row_once_in_an_order_of_its_own_and_not_that_of_the_file(
    ids: list[int], data: st.DataObject
) -> None:
    other = data.draw(st.permutations(ids))
    one, two = order(ids, [len(ids)], [1.0]), order(list(other), [len(ids)], [1.0])
    for step in range(2 * one.steps_per_epoch):
        assert [ids[row] for row in one.rows(step)] == [other[row] for row in two.rows(step)]
    epoch = np.concatenate([one.rows(step) for step in range(one.steps_per_epoch)])
    assert sorted(epoch.tolist()) == list(range(len(ids)))


def test_epochs_and_seeds_differ() -> None:
    ids = list(range(1, 200))
    rows = order(ids, [len(ids)], [1.0])
    first, second = (
        np.concatenate(
            [rows.rows(epoch * rows.steps_per_epoch + step) for step in range(rows.steps_per_epoch)]
        )
        for epoch in (0, 1)
    )
    assert (first != second).sum() > 190
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.2
    assert abs(np.corrcoef(first, np.arange(len(ids)))[0, 1]) < 0.2


@given(ids=SETS, share=st.floats(0.01, 0.1), data=st.data())
def test_who_is_held_out_does_not_depend_on_the_order_of_the_rows(
    ids: list[int], share: float, data: st.DataObject
) -> None:
    other = data.draw(st.permutations(ids))
    found = [
        {which[row] for row in split_holdout(len(ids), share, 3, np.array(which, np.uint64))[1].tolist()}
        for which in (ids, list(other))
    ]
    assert found[0] == found[1]
    assert len(found[0]) <= len(ids) // 10


def test_equal_contents_are_counted_and_hashes_spread_over_all_bits() -> None:
    hashes = np.array([7, 3, 7, 7, 3, 9], np.uint64)
    assert occurrences(hashes).tolist() == [1, 1, 2, 3, 2, 1]
    assert occurrences(hashes[:0]).tolist() == []
    values = mixed(np.arange(4096, dtype=np.uint64), 1, 2)
    bits = np.unpackbits(values.view(np.uint8)).reshape(4096, 64).mean(0)
    assert 0.45 < bits.min() < bits.max() < 0.55
    assert len(np.unique(values)) == 4096
