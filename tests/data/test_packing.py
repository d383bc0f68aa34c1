"""Packing keeps every row and every supervised token exactly once, whatever the capacity."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lorafit.data.packing import TokenRow, best_fit, make_packs, share


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


@st.composite
def alike_rows(draw: st.DrawFn) -> list[TokenRow]:
    """Rows of two or three different tokens, so that they often begin alike, are each other's beginning, or equal."""
    texts = draw(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=9), min_size=1, max_size=8))
    rows = []
    for ids in texts:
        trained = np.array(draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))))
        rows.append((np.array(ids, dtype=np.uint16), trained))
    return rows


@given(alike_rows())
def test_what_rows_begin_with_is_there_once_and_each_row_finds_its_own(rows: list[TokenRow]) -> None:
    (pack,) = make_packs(rows, 1000)
    starts = np.cumsum([0, *pack.lengths])
    found = [pack.index[start:end] for start, end in itertools.pairwise(starts)]
    texts = [tuple(pack.ids[where].tolist()) for where in found]
    given_texts = [tuple(ids.tolist()) for ids, _ in rows]
    # every document is the beginning of a row, and there are as many of them
    assert len(texts) == len(rows)
    assert all(any(whole[: len(text)] == text for whole in given_texts) for text in texts)
    # as many inputs as there are different beginnings, numbered in the order in which they first occur
    beginnings = {text[: end + 1] for text in texts for end in range(len(text))}
    assert len(pack.ids) == len(beginnings) == len(set(pack.keys.tolist()))
    assert (np.diff(np.unique(pack.index, return_index=True)[1]) > 0).all()
    # each target is predicted from the beginning that it has in a row
    of_place = {
        int(place): text[: at + 1]
        for where, text in zip(found, texts, strict=True)
        for at, place in enumerate(where)
    }
    predicted = sorted(
        (*of_place[int(at)], int(to)) for at, to in zip(pack.predict, pack.targets, strict=True)
    )
    wanted = sorted(
        tuple(ids[: at + 1].tolist()) for ids, trained in rows for at in range(1, len(ids)) if trained[at]
    )
    assert predicted == wanted


@given(alike_rows())
def test_keys_do_not_depend_on_what_else_is_in_the_pass(rows: list[TokenRow]) -> None:
    (pack,) = make_packs(rows, 1000)
    starts = np.cumsum([0, *pack.lengths])
    together = {tuple(pack.keys[pack.index[a:b]].tolist()) for a, b in itertools.pairwise(starts)}
    assert together == {tuple(each.keys.tolist()) for each in make_packs(rows, 1000, packing=False)}


def test_keys_that_are_equal_by_chance_share_nothing() -> None:
    ids = np.array([5, 6, 5, 7], np.int64)
    first, index = share(ids, [2, 2])
    assert (first.tolist(), index.tolist()) == ([0, 1, 3], [0, 1, 0, 2])
    for keys in ([1, 2, 1, 2], [1, 2, 3, 2], [1, 1, 1, 1]):  # another token; another beginning; both
        first, index = share(ids, [2, 2], np.array(keys, np.int64))
        assert (first.tolist(), index.tolist()) == ([0, 1, 2, 3], [0, 1, 2, 3])


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
