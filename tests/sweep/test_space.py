"""What a sweep varies: grids, ranges and draws, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.errors import ConfigError
from lorafit.sweep.space import Axis, draw, grid, parse_axes


def test_a_grid_is_every_combination_the_last_axis_fastest() -> None:
    axes = parse_axes(["lora.rank=8,16", "lora.targets=[q_proj,v_proj],all-linear"])
    assert grid(axes) == [
        {"lora.rank": "8", "lora.targets": "[q_proj,v_proj]"},
        {"lora.rank": "8", "lora.targets": "all-linear"},
        {"lora.rank": "16", "lora.targets": "[q_proj,v_proj]"},
        {"lora.rank": "16", "lora.targets": "all-linear"},
    ]


@given(st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_draws_are_within_their_ranges_and_the_same_for_one_seed(count: int, seed: int) -> None:
    axes = parse_axes(["train.learning_rate=1e-5..1e-2", "lora.rank=4..64", "lora.dropout=0..0.5"])
    points = draw(axes, count, seed)
    assert points == draw(axes, count, seed) == draw(axes, count + 5, seed)[:count]
    assert len(points) == count
    for point in points:
        assert 1e-5 * 0.999 <= float(point["train.learning_rate"]) <= 1e-2 * 1.001
        assert 4 <= int(point["lora.rank"]) <= 64
        assert 0 <= float(point["lora.dropout"]) <= 0.5


def test_a_range_above_zero_is_drawn_by_its_logarithm() -> None:
    points = draw([Axis("train.learning_rate", (), 1e-6, 1e-2)], 400, seed=1)
    below = sum(float(point["train.learning_rate"]) < 1e-4 for point in points)
    assert 150 < below < 250  # half of the orders of magnitude


def test_few_points_are_drawn_once_each() -> None:
    assert len(draw(parse_axes(["lora.rank=8,16"]), 10, seed=0)) == 2


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["lora.rnk=8"], "unknown key `lora.rnk`"),
        (["lora.rank"], "what varies is"),
        (["lora.rank="], "what varies is"),
        (["lora.rank=8", "lora.rank=9"], "`lora.rank` cannot vary here"),
        (["run.output=a,b"], "`run.output` cannot vary here"),
        (["lora.rank=9..3"], "a range goes from a number up to a larger one"),
        (["lora.rank=a..b"], "a range goes from a number up to a larger one"),
    ],
)
def test_what_is_refused(texts: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_axes(texts)


def test_a_range_is_no_grid_and_all_problems_come_at_once() -> None:
    with pytest.raises(ConfigError, match="`lora.rank` varies over a range") as caught:
        grid(parse_axes(["lora.rank=1..3"]))
    assert "--random" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        parse_axes(["a.b=1", "lora.rank"])
    assert len(caught.value.problems) == 2
