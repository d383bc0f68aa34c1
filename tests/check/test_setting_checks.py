"""Checks of settings: the numbers that a check names are those that the run uses."""

from __future__ import annotations

import numpy as np
import pytest

from lorafit.check.setting_checks import setting_verdicts
from lorafit.config.auto import LEAST_STEPS, Sizes, without_auto
from lorafit.config.load import load_config
from lorafit.config.schema import Config
from lorafit.data.row_order import RowOrder
from lorafit.errors import CheckResult


def checked(num_rows: int, *words: str) -> tuple[Config, dict[str, CheckResult]]:
    """The settled config of a run on rows of ten supervised tokens, and the checks of its settings by name."""
    sizes = Sizes(10**6, num_rows, 10 * num_rows, num_rows // 10)
    config = without_auto(load_config(None, ["model.name=m", "data.path=rows.json", *words]), sizes)
    order = RowOrder([np.arange(num_rows)], [1.0], config.train.batch_size, config.train.seed, True)
    return config, {result.name: result for result in setting_verdicts(config, order, sizes)}


@pytest.mark.parametrize(
    ("warmup", "num_steps", "steps"),
    [("0.03", 10, 1), ("0.5", 10, 5), ("500", 10, 9), ("4", 10, 4), ("1", 1, 0)],
)
def test_the_check_of_the_warm_up_names_the_steps_of_the_run(warmup: str, num_steps: int, steps: int) -> None:
    config, results = checked(40, f"train.warmup={warmup}", f"train.max_steps={num_steps}")
    assert config.train.warmup_steps(num_steps) == steps
    assert results["warm-up"].message.startswith(f"{steps} of {num_steps} steps")
    assert (results["warm-up"].verdict == "warn") == (steps > num_steps / 2)


@pytest.mark.parametrize("num_rows", [1, 3, 54, 900, 30_000])
def test_few_steps_are_a_warning_whose_hint_ends_it(num_rows: int) -> None:
    few = checked(num_rows, f"train.max_steps={LEAST_STEPS - 1}")[1]["steps"]
    assert few.verdict == "warn"
    assert few.message.endswith("too few steps to learn much")
    assert "train.epochs=auto" in few.hint
    assert checked(num_rows, "train.epochs=auto")[1]["steps"].verdict == "pass"
    assert (
        checked(num_rows, "train.epochs=auto", f"train.batch_size={num_rows}")[1]["steps"].verdict == "pass"
    )


@pytest.mark.parametrize(("epochs", "verdict"), [("12", "pass"), ("90", "warn")])
def test_epochs_of_uneven_steps_are_the_epochs_that_were_given(epochs: str, verdict: str) -> None:
    _, results = checked(60, f"train.epochs={epochs}", "train.batch_size=16")
    assert f", {epochs} epochs" in results["steps"].message
    assert results["steps"].verdict == verdict
