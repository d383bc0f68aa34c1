"""Packing keeps every row and every supervised token exactly once, whatever the capacity."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lorafit.data.packing import Packer, TokenRow, best_fit, build_pack, share_prefixes
from lorafit.forward import prefix_keys


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
    packs = Packer(capacity, packing).packs(rows)
    wanted = sorted(int(token) for ids, trained in rows for token in ids[trained])
    assert sorted(int(token) for pack in packs for token in pack.targets) == wanted
    assert sum(pack.num_tokens for pack in packs) == sum(len(ids) for ids, _ in rows)
    for pack in packs:
        assert sum(pack.lengths) == len(pack.ids)
        assert packing is False or len(pack.lengths) == 1 or sum(pack.lengths) <= capacity
        # ids count up within a row, so the token before a target is the target minus one
        np.testing.assert_array_equal(pack.ids[pack.predict] + 1, pack.targets)
        owners = np.repeat(pack.rows, pack.counts)
        np.testing.assert_array_equal(owners, pack.targets // 100)  # the ids of row n begin at 100 n


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
    pack = build_pack(rows)
    starts = np.cumsum([0, *pack.lengths])
    found = [pack.index[start:end] for start, end in itertools.pairwise(starts)]
    texts = [tuple(pack.ids[where].tolist()) for where in found]
    given_texts = [tuple(ids.tolist()) for ids, _ in rows]
    # every document is the beginning of a row, and there are as many of them
    assert len(texts) == len(rows)
    assert all(any(whole[: len(text)] == text for whole in given_texts) for text in texts)
    # as many inputs as there are different beginnings, numbered in the order in which they first occur
    beginnings = {text[: end + 1] for text in texts for end in range(len(text))}
    assert len(pack.ids) == len(beginnings)
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


@given(st.lists(st.lists(st.integers(0, 70_000), min_size=1, max_size=6), min_size=1, max_size=6))
def test_only_neighbours_that_begin_alike_share(texts: list[list[int]]) -> None:
    """Also ids of which only some bytes are alike, and documents that are not sorted."""
    inputs, paths = share_prefixes([np.array(ids, np.uint32) for ids in texts])
    assert [inputs[path].tolist() for path in paths] == texts
    alike = [
        sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
        for one, other in itertools.pairwise(texts)
    ]
    assert len(inputs) == sum(map(len, texts)) - sum(alike)


@given(alike_rows())
def test_a_key_stands_for_a_token_and_all_before_it_wherever_they_lie(rows: list[TokenRow]) -> None:
    texts = [tuple(ids.tolist()) for ids, _ in rows]
    ids = np.array([token for text in texts for token in text], np.int64)
    keys = iter(prefix_keys(ids, list(map(len, texts))).tolist())
    of_beginning: dict[tuple[int, ...], int] = {}
    for text in texts:
        for end in range(len(text)):
            key = next(keys)
            assert of_beginning.setdefault(text[: end + 1], key) == key
    assert len(set(of_beginning.values())) == len(of_beginning)
    alone = prefix_keys(np.array(texts[-1], np.int64), [len(texts[-1])])
    assert alone.tolist() == [of_beginning[texts[-1][: end + 1]] for end in range(len(texts[-1]))]


def test_a_target_is_no_input_unless_something_later_needs_it() -> None:
    ids, trained = np.array([5, 6, 7, 8], np.uint32), np.array([False, False, True, False])
    pack = build_pack([(ids, trained)])
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
