"""The learning rate of each step, and clipping of the gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

from torch import Tensor, nn


def learning_rate(
    step: int, num_steps: int, peak: float, schedule: Literal["cosine", "linear", "constant"], warmup: int
) -> float:
    """The rate of step number `step` (from 0).

    Warm-up rises from peak / (warmup + 1), so that no step has a rate of zero. After it `linear` falls as in
    transformers' linear schedule, `cosine` along half a wave.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    done = (step - warmup) / max(1, num_steps - warmup)
    return peak * (1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)


def clip(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients to a norm of at most `max_norm` (0 for never); returns their norm before, a scalar."""
    return nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
