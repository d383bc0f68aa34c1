"""`auto` in the train section: what it becomes, for every size of model and data, and what it leaves alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.config.auto import LEAST_STEPS, LONGER, MOST_EPOCHS, Sizes, picked, without_auto
from lorafit.config.fields import AUTO
from lorafit.config.load import load_config, recipe_file, validate
from lorafit.config.schema import Config
from lorafit.errors import ConfigError

NUMBERS = ("epochs", "batch_size", "learning_rate", "eval_every", "tolerance", "refit", "patience")
SIZES = st.builds(
    Sizes,
    st.none() | st.integers(1, 10**12),
    st.integers(1, 10**8),
    st.integers(1, 10**12),
    st.integers(0, 100),
)  # fmt: skip
GIVEN = st.fixed_dictionaries(
    {},
    optional={
        "epochs": st.floats(0.01, 100),
        "max_steps": st.integers(1, 10**6),
        "batch_size": st.integers(1, 1000),
        "learning_rate": st.floats(1e-6, 0.5),
        "eval_every": st.integers(1, 1000),
        "tolerance": st.floats(0, 10),
        "patience": st.integers(0, 9),
    },
)


def config_with(train: Mapping[str, Any]) -> Config:
    return validate({"model": {"name": "m"}, "data": {"path": "d"}, "train": train})


def num_steps(config: Config, rows: int) -> int:
    return math.ceil(config.train.epochs * math.ceil(rows / config.train.batch_size))


@given(GIVEN, SIZES)
def test_every_auto_becomes_a_number_and_every_number_stays(given: dict[str, Any], sizes: Sizes) -> None:
    config = config_with(given)
    chosen = without_auto(config, sizes)
    assert all(getattr(chosen.train, name) != AUTO for name in NUMBERS)
    assert all(getattr(chosen.train, name) == value for name, value in given.items())
    assert "auto" not in chosen.model_dump(mode="json")["train"].values()
    assert without_auto(chosen, sizes) is chosen
    named = {word.partition("=")[0] for word in picked(config, chosen).split() if "=" in word}
    length = {"epochs"} - (given.keys() | ({"epochs"} if "max_steps" in given else set()))
    assert named == {f"train.{key}" for key in length | ({"batch_size", "learning_rate"} - given.keys())}


@given(SIZES, st.none() | st.integers(1, 5000))
def test_a_run_of_auto_length_is_never_a_few_steps_and_never_endless(sizes: Sizes, batch: int | None) -> None:
    config = without_auto(config_with({"batch_size": batch} if batch else {}), sizes)
    assert num_steps(config, sizes.rows) >= LEAST_STEPS
    assert 1 <= config.train.epochs <= max(LONGER * MOST_EPOCHS, LEAST_STEPS)
    assert (config.train.patience > 0) == (sizes.held_out > 0)


@given(SIZES, st.integers(2, 100))
def test_more_rows_are_not_more_epochs_and_a_larger_model_has_no_higher_rate(
    sizes: Sizes, factor: int
) -> None:
    plain = config_with({"batch_size": 1})
    small = without_auto(plain, Sizes(10**5, 20 + sizes.rows, sizes.characters, 0)).train
    large = without_auto(
        plain, Sizes(10**5 * factor, (20 + sizes.rows) * factor, sizes.characters * factor, 0)
    ).train
    assert large.epochs <= small.epochs
    assert large.learning_rate <= small.learning_rate


def test_a_run_of_given_length_is_measured_saved_and_ended_as_before() -> None:
    for length in ({"epochs": 3}, {"max_steps": 40}):
        train = without_auto(config_with(length), Sizes(10**8, 60, 700, 6)).train
        assert (train.eval_every, train.tolerance, train.patience) == (100, 0, 0)


@pytest.mark.parametrize(
    ("train", "data", "held_out", "refit"),
    [
        ({}, {}, 6, True),
        ({}, {}, 0, False),
        ({}, {"eval_path": "other"}, 6, False),
        ({"max_steps": 9}, {}, 6, False),
        ({"max_steps": 9, "refit": True}, {}, 6, True),
    ],
)
def test_few_rows_are_all_trained_in_the_end(
    train: dict[str, Any], data: dict[str, Any], held_out: int, refit: bool
) -> None:
    config = validate({"model": {"name": "m"}, "data": {"path": "d", **data}, "train": train})
    assert without_auto(config, Sizes(1, 54, 600, held_out)).train.refit is refit
    assert without_auto(config, Sizes(1, 5400, 600, held_out)).train.refit is train.get("refit", False)


def test_rows_to_measure_on_are_never_trained() -> None:
    with pytest.raises(ConfigError, match="train.refit"):
        load_config(None, ["model.name=m", "data.path=d", "data.eval_path=e", "train.refit=true"])


def test_a_large_model_on_much_data_has_the_usual_numbers() -> None:
    train = without_auto(config_with({}), Sizes(1_100_000_000, 52_000, 12_000_000, 100)).train
    assert (train.epochs, train.batch_size, train.learning_rate, train.eval_every) == (1, 16, 2e-4, 100)


@pytest.mark.parametrize("name", ["classic"])
def test_classic_has_no_auto_that_changes_a_result(name: str) -> None:
    config = load_config(recipe_file(name))
    chosen = without_auto(config, Sizes(1_100_000_000, 60, 700, 6))
    assert (chosen.train.epochs, chosen.train.batch_size, chosen.train.learning_rate) == (1, 4, 2e-4)
    assert (chosen.train.tolerance, chosen.train.patience, picked(config, chosen)) == (0, 0, "")
