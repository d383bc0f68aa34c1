"""Products of a few rows, as in generating: compiled, because torch's read a large weight at half the memory's rate.

Nothing but speed depends on it: where it is not the way, model/lora_linear.py does the same in torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.model.linear import Linear
from lorafit.model.native import fits, kernels
from lorafit.model.quant import Int8Linear

MOST_ROWS = 16  # with more of them torch's products are as fast


@dataclass(frozen=True, slots=True)
class Pairs:
    """The pairs A, B and scale of several adapters for one linear, and which of them each row takes.

    `which` int64 (rows,) is -1 where a row takes none, `ranks`, `a` and `b` int64 (pairs,), the latter addresses of
    float32 matrices that someone else keeps, `scales` float32 (pairs,).
    """

    which: Tensor
    ranks: Tensor
    a: Tensor
    b: Tensor
    scales: Tensor


def are_few(linears: Sequence[nn.Module], x: Tensor) -> bool:
    """Whether this is the way for `linears` (frozen or adapted) and rows x (rows, ...).

    In inference mode only, where nothing is differentiated, and never with dropout.
    """
    return (
        x.shape[0] <= MOST_ROWS
        and torch.is_inference_mode_enabled()
        and fits(x)
        and all(_suits(linear, x.dtype) for linear in linears)
    )


def decode_linear(linear: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """What `linear` makes of x (rows, in_features), plus `residual`; the adapter's masters are read as they are."""
    base = getattr(linear, "base", linear)
    scale, smooth_scale = (base.scale, base.smooth_scale) if isinstance(base, Int8Linear) else (None, None)
    whole = (x, base.weight, scale, smooth_scale, base.bias, residual)
    if base is linear or not linear.enabled:
        return _product(*whole)
    if (pairs := getattr(linear, "pairs", None)) is not None:  # model/multi_lora.py
        return _product_pairs(*whole, pairs)
    return _product(*whole, len(linear.lora_A), linear.lora_A, linear.lora_B, float(linear.scale))


def head(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T for x (rows, in_features)."""
    if x.shape[0] <= MOST_ROWS and torch.is_inference_mode_enabled() and fits(x, weight):
        return _product(x, weight)
    return x @ weight.t()


def _suits(linear: Any, dtype: torch.dtype) -> bool:
    base = getattr(linear, "base", linear)
    if base is not linear and linear.enabled and linear.training and linear.dropout:
        return False
    return isinstance(base, Int8Linear) or (isinstance(base, Linear) and base.weight.dtype == dtype)


def _product(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    smooth_scale: Tensor | None = None,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    rank: int = 0,
    a: Tensor | None = None,
    b: Tensor | None = None,
    factor: float = 0.0,
) -> Tensor:
    compiled = kernels()
    assert compiled is not None
    rows, width = x.shape
    out = x.new_empty(rows, weight.shape[0])
    given = (x, weight, scale, smooth_scale, bias, addend, rank, a, b, factor)
    compiled.call("decode_linear", x.dtype, rows, width, weight.shape[0], *given, out)
    return out


def _product_pairs(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    smooth_scale: Tensor | None,
    bias: Tensor | None,
    addend: Tensor | None,
    pairs: Pairs,
) -> Tensor:
    compiled = kernels()
    assert compiled is not None
    rows, width = x.shape
    out = x.new_empty(rows, weight.shape[0])
    given = (x, weight, scale, smooth_scale, bias, addend, len(pairs.ranks), pairs.which, pairs.ranks)
    where = (pairs.a, pairs.b, pairs.scales)
    compiled.call("decode_linear_pairs", x.dtype, rows, width, weight.shape[0], *given, *where, out)
    return out
