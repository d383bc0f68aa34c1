"""Fast linear layers for decoding (1 to 16 rows): compiled kernels, with the same results as model/lora_linear.py.

torch's products read a large weight at half the memory's rate for so few rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.model.definitions import wide
from lorafit.model.native import Kernels, fits, kernels

MOST_ROWS = 16  # with more rows torch's products are as fast
COLUMNS_AT_ONCE = 4096  # rows of a weight that are converted at a time


@dataclass(frozen=True, slots=True)
class Pairs:
    """A, B and scale of several adapters for one linear, and the adapter of each row.

    `which` int64 (rows,) is -1 for a row without an adapter. `ranks`, `a` and `b` are int64 (pairs,); `a` and `b` are
    addresses of float32 matrices that the caller keeps alive. `scales` is float32 (pairs,).
    """

    which: Tensor
    ranks: Tensor
    a: Tensor
    b: Tensor
    scales: Tensor


def are_few(linears: Sequence[nn.Module], x: Tensor) -> bool:
    """Whether the kernels can compute `linears` (frozen, or with plain LoRA) for rows x (rows, ...).

    Only in inference mode, where nothing is differentiated, and never with dropout.
    """
    return (
        x.shape[0] <= MOST_ROWS
        and torch.is_inference_mode_enabled()
        and fits(x)
        and all(_suits(linear, x.dtype) for linear in linears)
    )


def decode_linear(linear: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """The output of `linear` for x (rows, in_features), plus `residual`; A and B are read as float32."""
    base = getattr(linear, "base", linear)
    operands = (x, *base.decode_operands(x.dtype), base.bias, residual)
    if base is linear or not linear.enabled:
        return _call("decode_linear", *operands, 0, None, None, 0.0)
    pairs: Pairs | None = getattr(linear, "pairs", None)
    if pairs is None:
        rank, scale = len(linear.lora_A), float(linear.scale)
        return _call("decode_linear", *operands, rank, linear.lora_A, linear.lora_B, scale)
    adapters = (len(pairs.ranks), pairs.which, pairs.ranks, pairs.a, pairs.b, pairs.scales)
    return _call("decode_linear_pairs", *operands, *adapters)  # model/multi_lora.py


def head(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T for x (rows, in_features), in float32 or wider: in 16 bits the best two logits are often equal."""
    dtype = wide(x.dtype)
    if torch.is_inference_mode_enabled() and fits(x, weight):
        out = x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)
        for rows, to in zip(x.split(MOST_ROWS), out.split(MOST_ROWS), strict=True):
            _kernels().call("head", x.dtype, *rows.shape, weight.shape[0], rows, weight, to)
        return out
    if dtype == x.dtype:
        return x @ weight.t()
    if x.is_cuda and not x.requires_grad:
        return torch.mm(x, weight.t(), out_dtype=dtype)
    parts = weight.split(COLUMNS_AT_ONCE)  # a copy of the whole weight would be twice as large as it
    return torch.cat([x.to(dtype) @ part.to(dtype).t() for part in parts], dim=-1)


def _suits(linear: Any, dtype: torch.dtype) -> bool:
    base = getattr(linear, "base", linear)
    if (
        base is not linear
        and linear.enabled
        and (not linear.is_plain or (linear.training and linear.dropout))
    ):
        return False
    return base.decode_operands(dtype) is not None


def _call(kernel: str, x: Tensor, weight: Tensor, *operands: Tensor | int | float | None) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[0])
    _kernels().call(kernel, x.dtype, *x.shape, weight.shape[0], x, weight, *operands, out)
    return out


def _kernels() -> Kernels:
    compiled = kernels()
    assert compiled is not None
    return compiled
