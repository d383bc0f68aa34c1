"""The optimizer, and the learning rate of each step."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor, nn

from lorafit.config.schema import Config
from lorafit.model.adamw import AdamW
from lorafit.model.lora import adapter_parameters


def make_optimizer(network: nn.Module, config: Config) -> AdamW:
    """AdamW over the adapter. B, and vectors as in PEFT's LoRA+, have `lora.b_rate` times the rate."""
    parameters = adapter_parameters(network)
    factors: dict[Tensor, float] = {
        parameter: config.lora.b_rate
        for name, parameter in parameters.items()
        if config.lora.b_rate != 1 and (name.endswith(".lora_B") or parameter.ndim == 1)
    }
    return AdamW(parameters.values(), config.train.weight_decay, factors)


FALL = 0.2  # the part of a `wsd` run in which the rate falls


def learning_rate(
    step: int,
    num_steps: float,
    peak: float,
    schedule: Literal["auto", "cosine", "linear", "constant", "wsd"],
    warmup: int,
) -> float:
    """The rate of step number `step` (from 0).

    Warm-up rises from peak / (warmup + 1), so that no step has a rate of zero. After it `linear` falls as in
    transformers' linear schedule, `cosine` along half a wave; `wsd` stays and falls linearly in the last fifth.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    if schedule == "wsd":
        return peak * min(1.0, (num_steps - step) / max(1.0, num_steps * FALL))
    done = (step - warmup) / max(1, num_steps - warmup)
    return peak * (1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)
