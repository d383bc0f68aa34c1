"""AdamW over the adapter's masters, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

BETAS, EPS = (0.9, 0.999), 1e-8  # what transformers, peft and the papers on LoRA use


def make_optimizer(masters: Iterable[nn.Parameter], weight_decay: float) -> torch.optim.AdamW:
    """AdamW with decoupled decay (Loshchilov and Hutter, 2019); the loop sets the rate before each step."""
    return torch.optim.AdamW(masters, lr=0.0, betas=BETAS, eps=EPS, weight_decay=weight_decay, foreach=True)


def warmup_steps(warmup: float, num_steps: int) -> int:
    """Warm-up in steps: a share of the run below 1, else a count; always shorter than the run."""
    return min(num_steps - 1, math.ceil(warmup * num_steps) if warmup < 1 else int(warmup))


def learning_rate(
    step: int, num_steps: int, peak: float, schedule: Literal["cosine", "linear", "constant"], warmup: int
) -> float:
    """The rate that step number `step` (from 0) uses.

    Warm-up rises from peak / (warmup + 1), so that no step is wasted at zero; after it linear falls as
    transformers' linear schedule does, cosine along half a wave.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    done = (step - warmup) / max(1, num_steps - warmup)
    return peak * (1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)


def clip(masters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients to at most `max_norm` (0 for never) and return their norm from before, a scalar."""
    gradients = [master.grad for master in masters if master.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # the 1e-6 is torch.nn.utils.clip_grad_norm_'s
        torch._foreach_mul_(gradients, factor)
    return norm
