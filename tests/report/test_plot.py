"""Charts: thinning keeps what stands out, axes hold their values, nothing lags."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.report.plot import (
    BUCKETS,
    Line,
    extremes,
    histogram,
    line_chart,
    linear_axis,
    smoothed,
    thinned,
    value_axis,
)

VALUES = st.floats(-1e12, 1e12, allow_nan=False).map(lambda value: round(value, 6))


@given(st.lists(VALUES, min_size=1, max_size=3000))
def test_thinning_keeps_the_ends_the_least_and_the_most(values: list[float]) -> None:
    points = [(float(step), value) for step, value in enumerate(values)]
    kept = extremes(points, 0, len(points), buckets=20)
    assert len(kept) <= 2 * 20 + 2
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    assert set(kept) <= set(points)
    ys = [y for _, y in kept]
    assert (min(ys), max(ys)) == (min(values), max(values))


def test_a_spike_of_one_step_in_a_million_is_drawn() -> None:
    points = [(float(step), 1.0) for step in range(1_000_00)]
    points[54_321] = (54_321.0, 9.0)
    assert (54_321.0, 9.0) in extremes(points, 0, 100_000)
    assert len(extremes(points, 0, 100_000)) <= 2 * BUCKETS + 2


@given(VALUES, VALUES)
def test_an_axis_holds_its_values_and_its_ticks_rise(first: float, second: float) -> None:
    low, high = sorted((first, second))
    axis = linear_axis(low, high, 4)
    room = 1e-6 * (abs(low) + abs(high))
    assert axis.low <= low + room
    assert axis.high >= high - room
    assert list(axis.ticks) == sorted(set(axis.ticks))
    assert 2 <= len(axis.ticks) <= 9
    assert -1e-6 <= axis.at(low) <= axis.at(high) <= 1 + 1e-6


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=50), st.booleans())
def test_a_value_axis_holds_all_values(values: list[float], log: bool) -> None:
    axis = value_axis(values, log=log)
    assert all(-1e-6 <= axis.at(value) <= 1 + 1e-6 for value in values)


def test_an_axis_of_tiny_values_has_a_length() -> None:
    axis = value_axis([1e-13, 1.1e-13])
    assert axis.low <= 1e-13 < 1.1e-13 <= axis.high


def test_a_few_large_values_make_a_logarithmic_axis_only_where_asked() -> None:
    values = [1.0] * 50 + [0.01, 900.0]
    assert value_axis(values, log=True).is_log
    assert not value_axis(values).is_log
    assert not value_axis([1.0, 2.0, 3.0], log=True).is_log


def test_smoothing_follows_without_lag() -> None:
    line = [(float(step), 3.0 * step) for step in range(300)]
    assert all(math.isclose(y, 3 * x, abs_tol=1e-6) for x, y in smoothed(line))
    noisy = [(float(step), float((-1) ** step)) for step in range(600)]
    assert max(abs(y) for _, y in smoothed(noisy)[50:-50]) < 0.2


def test_no_line_and_no_mean_reaches_over_a_new_beginning() -> None:
    """The second phase of a run begins with the untrained adapter: its first losses are not those of the first one."""
    points = [(float(step), 1.0 if step <= 150 else 9.0) for step in range(1, 301)]
    assert smoothed(points, 30, [150.0]) == points
    chart = line_chart("Loss", [Line("training", "train", points)], str, phases=[150.0])
    assert chart is not None
    (path,) = (path for style, path in chart.paths if style == "line train")
    heights = [{pair.split()[1] for pair in part.split("L")} for part in path.split("M")[1:]]
    assert [len(part) for part in heights] == [1, 1]


@pytest.mark.parametrize("count", [1, 2, 5, 700])
def test_a_chart_of_any_number_of_points(count: int) -> None:
    points = [(float(step), 2.0) for step in range(count)]
    chart = line_chart("T", [Line("a", "one", points)], str)
    assert chart is not None
    assert [style.split()[0] for style, _ in chart.paths] == (["line"] if count > 1 else ["dots"])
    assert "nan" not in str(chart)


def test_nothing_gives_nothing() -> None:
    assert line_chart("T", [Line("a", "one", [])], str) is None
    assert histogram("T", [0, 1], [("a", "train", [0])]) is None
    assert histogram("T", [0, 1, 2], [("a", "train", [1])]) is None


def test_bars_are_as_high_as_their_rows() -> None:
    chart = histogram("T", [0, 10, 20], [("a", "train", [10, 20]), ("b", "held", [10, 0])])
    assert chart is not None
    assert [(bar.style, bar.height) for bar in chart.bars] == [("train", 500), ("held", 500), ("train", 1000)]


def test_thinned_keeps_both_ends() -> None:
    assert thinned(list(range(100)), 5) == [0, 25, 50, 74, 99]
    assert thinned([1, 2], 5) == [1, 2]
