"""Checks of settings: the numbers that a check names are those that the run uses."""

from __future__ import annotations

import numpy as np
import pytest

from lorafit.check.setting_checks import setting_verdicts
from lorafit.config.load import load_config
from lorafit.data.row_order import RowOrder


@pytest.mark.parametrize(
    ("warmup", "num_steps", "steps"),
    [("0.03", 10, 1), ("0.5", 10, 5), ("500", 10, 9), ("4", 10, 4), ("1", 1, 0)],
)
def test_the_check_of_the_warm_up_names_the_steps_of_the_run(warmup: str, num_steps: int, steps: int) -> None:
    words = ["model.name=m", "data.path=rows.json", f"train.warmup={warmup}", f"train.max_steps={num_steps}"]
    config = load_config(None, words)
    order = RowOrder([np.arange(40)], [1.0], config.train.batch_size, config.train.seed, True)
    results = {result.name: result for result in setting_verdicts(config, order, 4, None)}
    assert config.train.warmup_steps(num_steps) == steps
    assert results["warm-up"].message.startswith(f"{steps} of {num_steps} steps")
    assert (results["warm-up"].verdict == "warn") == (steps > num_steps / 2)
