"""The learning rate of each step, and clipping of the gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
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
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # the 1e-6 is torch.nn.utils.clip_grad_norm_'s
        torch._foreach_mul_(gradients, factor)
    return norm
