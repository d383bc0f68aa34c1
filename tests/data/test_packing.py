"""Packing keeps every row and every supervised token exactly once, whatever the capacity."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lorafit.data.packing import TokenRow, best_fit, make_packs


@st.composite
def token_rows(draw: st.DrawFn) -> list[TokenRow]:
    rows = []
    for _ in range(draw(st.integers(1, 12))):
        length = draw(st.integers(2, 30))
        trained = np.array(draw(st.lists(st.booleans(), min_size=length, max_size=length)))
        trained[0], trained[draw(st.integers(1, length - 1))] = False, True
        rows.append((np.arange(length, dtype=np.uint32) + 100 * len(rows), trained))
    return rows


@given(token_rows(), st.integers(8, 64), st.booleans())
def test_every_supervised_token_is_predicted_once_from_its_own_past(
    rows: list[TokenRow], capacity: int, packing: bool
) -> None:
    packs = make_packs(rows, capacity, packing)
    wanted = sorted(int(token) for ids, trained in rows for token in ids[trained])
    assert sorted(int(token) for pack in packs for token in pack.targets) == wanted
    assert sum(pack.num_tokens for pack in packs) == sum(len(ids) for ids, _ in rows)
    for pack in packs:
        assert sum(pack.lengths) == len(pack.ids)
        assert packing is False or len(pack.lengths) == 1 or sum(pack.lengths) <= capacity
        # ids count up within a row, so the token before a target is the target minus one
        np.testing.assert_array_equal(pack.ids[pack.predict] + 1, pack.targets)


def test_a_target_is_no_input_unless_something_later_needs_it() -> None:
    ids, trained = np.array([5, 6, 7, 8], np.uint32), np.array([False, False, True, False])
    (pack,) = make_packs([(ids, trained)], 10)
    assert pack.ids.tolist() == [5, 6]
    assert pack.predict.tolist() == [1]
    assert pack.targets.tolist() == [7]


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 200))
def test_best_fit_fills_bins_without_overflow(lengths: list[int], capacity: int) -> None:
    bins = best_fit(lengths, capacity)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in members) <= capacity for members in bins)
    # no two bins could have been one
    totals = sorted(sum(lengths[index] for index in members) for members in bins)
    assert len(totals) < 2 or totals[0] + totals[1] > capacity


def test_best_fit_wastes_little_on_rows_of_real_lengths() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.2, 0.7, 2000), 10, 1000).astype(int).tolist()
    bins = best_fit(lengths, 2048)
    assert sum(lengths) / (2048 * len(bins)) > 0.97
