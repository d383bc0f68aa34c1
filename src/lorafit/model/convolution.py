"""The causal depthwise convolution of packed documents: a token sees its own document only, whatever lies beside it.

On the CPU by compiled kernels (model/native/convolution.cpp), else in torch. Sums are float32, or float64 for float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorafit.model.definitions import wide
from lorafit.model.native import fits, kernels


def convolution(x: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
    """y[t] = sum over j of weight[:, 0, width - 1 - j] * x[t - j], over the tokens of t's document.

    x (tokens, channels), a frozen weight (channels, 1, width), positions int64 (tokens,) in each token's document.
    """
    taps = weight.detach().flatten(1).t().to(wide(x.dtype)).contiguous()
    out: Tensor = _Convolution.apply(x.contiguous(), taps, positions)  # type: ignore[no-untyped-call]
    return out


def latest(window: Tensor, weight: Tensor) -> Tensor:
    """The convolution at the last token of each window (rows, width, channels): (rows, channels)."""
    taps = weight.flatten(1).t().to(wide(window.dtype))
    out = torch.zeros_like(window[:, -1], dtype=taps.dtype)
    for tap, tokens in zip(reversed(taps), reversed(window.unbind(1)), strict=True):
        out += tap * tokens
    return out.to(window.dtype)


class _Convolution(torch.autograd.Function):
    """It is linear in x and the weight is frozen: the backward pass needs no token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(taps, positions)
        return _convolved(x, taps, positions, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        taps, positions = ctx.saved_tensors
        return _convolved(grad_outputs[0].contiguous(), taps, positions, backward=True), None, None


def _convolved(x: Tensor, taps: Tensor, positions: Tensor, backward: bool) -> Tensor:
    """The convolution, or its transpose: then a token gets from the later ones of its document that it has reached."""
    if fits(x):
        out, compiled = torch.empty_like(x), kernels()
        assert compiled is not None
        compiled.call("convolve", x.dtype, *x.shape, len(taps), int(backward), positions, x, taps, out)
        return out
    numbers = x.to(taps.dtype)
    total = numbers * taps[-1]
    for back in range(1, min(len(taps), len(x))):
        reaches = (positions[back:] >= back)[:, None]
        source, goal = (slice(back, None), slice(-back)) if backward else (slice(-back), slice(back, None))
        total[goal] += torch.where(reaches, numbers[source] * taps[-1 - back], 0)
    return total.to(x.dtype)
