"""The row order is a pure function of seed and step that trains every row exactly as often as its weight says."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.data.row_order import RowOrder, split_holdout


def order(
    counts: list[int], weights: list[float], batch: int = 4, shuffle: bool = True, seed: int = 1
) -> RowOrder:
    ends = np.cumsum([0, *counts])
    groups = [np.arange(start, end) for start, end in pairwise(ends)]
    return RowOrder(groups, weights, batch, seed, shuffle)


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 5), st.booleans())
def test_an_epoch_trains_every_row_once(count: int, batch: int, epoch: int, shuffle: bool) -> None:
    rows = order([count], [1.0], batch, shuffle)
    first = epoch * rows.steps_per_epoch
    steps = [rows.rows(step) for step in range(first, first + rows.steps_per_epoch)]
    assert sorted(np.concatenate(steps).tolist()) == list(range(count))
    assert all(len(step) == batch for step in steps[:-1])


def test_epochs_differ_and_steps_do_not_depend_on_what_was_asked_before() -> None:
    rows = order([50], [1.0])
    straight = [rows.rows(step).tolist() for step in range(3 * rows.steps_per_epoch)]
    fresh = order([50], [1.0])
    assert [fresh.rows(step).tolist() for step in reversed(range(len(straight)))] == straight[::-1]
    assert straight[: rows.steps_per_epoch] != straight[rows.steps_per_epoch : 2 * rows.steps_per_epoch]


def test_another_seed_is_another_order_and_file_order_is_kept_without_shuffle() -> None:
    assert order([50], [1.0], seed=1).rows(0).tolist() != order([50], [1.0], seed=2).rows(0).tolist()
    assert order([50], [1.0], shuffle=False).rows(1).tolist() == [4, 5, 6, 7]


def test_weights_are_how_often_an_epoch_sees_the_rows() -> None:
    rows = order([10, 20, 8], [2.0, 0.5, 1.0])
    assert rows.rows_per_epoch == 20 + 10 + 8
    epochs = []
    for epoch in range(2):
        first = epoch * rows.steps_per_epoch
        seen = Counter(
            row for step in range(rows.steps_per_epoch) for row in rows.rows(first + step).tolist()
        )
        assert [seen[row] for row in range(10)] == [2] * 10
        half = {row for row in range(10, 30) if seen[row]}
        assert len(half) == 10
        assert [seen[row] for row in range(30, 38)] == [1] * 8
        epochs.append(half)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(
    ("num_rows", "holdout", "expected"),
    [(1000, 100, 100), (1000, 0.05, 50), (200, 100, 20), (5, 100, 0), (1000, 0, 0), (1000, 0.5, 100)],
)
def test_holdout_is_a_share_or_a_number_and_at_most_a_tenth(
    num_rows: int, holdout: float, expected: int
) -> None:
    training, held = split_holdout(num_rows, holdout, seed=3)
    assert len(held) == expected
    assert sorted([*training.tolist(), *held.tolist()]) == list(range(num_rows))


def test_steps_of_a_run() -> None:
    rows = order([50], [1.0], batch=4)
    assert rows.steps_per_epoch == 13
    assert rows.num_steps(2, None) == 26
    assert rows.num_steps(0.5, None) == 7
    assert rows.num_steps(2, 5) == 5
    assert rows.epoch_at(26) == 2
