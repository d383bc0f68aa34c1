"""The loss scale of float16: halved by an overflow, doubled after a calm time, given up on where it cannot help."""

from __future__ import annotations

import pytest
import torch

from lorafit.errors import TrainingError
from lorafit.training.loss_scale import LossScale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_other_types_are_never_scaled(dtype: torch.dtype) -> None:
    scale = LossScale.for_dtype(dtype)
    for _ in range(5000):
        scale.went_well()
    assert (scale.factor, scale.active) == (1.0, False)


def test_an_overflow_halves() -> None:
    scale = LossScale.for_dtype(torch.float16)
    assert (scale.factor, scale.active) == (2.0**16, True)
    scale.overflowed(1)
    scale.overflowed(1)
    assert scale.factor == 2.0**14


def test_two_thousand_calm_steps_double_and_an_overflow_starts_the_count_anew() -> None:
    scale = LossScale.for_dtype(torch.float16)
    factors = []
    for step in range(1, 6001):
        scale.went_well()
        if step == 3999:
            scale.overflowed(step)
        factors.append(scale.factor)
    assert [step for step in range(1, 6000) if factors[step] != factors[step - 1]] == [1999, 3998, 5998]
    assert factors[1999] == 2.0**17
    assert factors[3998] == 2.0**16
    assert factors[5998] == 2.0**17


def test_the_scale_has_a_ceiling() -> None:
    scale = LossScale.for_dtype(torch.float16)
    for _ in range(2000 * 12):
        scale.went_well()
    assert scale.factor == 2.0**24


def test_what_halving_cannot_cure_stops_the_run() -> None:
    scale = LossScale.for_dtype(torch.float16)
    with pytest.raises(TrainingError, match="step 7: the gradient is not finite at any loss scale") as caught:
        for _ in range(100):
            scale.overflowed(7)
    assert scale.factor < 1
    assert "model.dtype=float32" in caught.value.problems[0].hint
