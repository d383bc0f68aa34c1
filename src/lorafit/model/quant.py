"""Frozen linears in fewer bits: int8 and fp8 that multiply as they are, nf4 that is unpacked for each product.

int8 and fp8 follow SwitchBack (Wortsman et al., 2023) as far as LoRA needs it: weights are quantised once, inputs
and output gradients per token and on the fly, and both products run in few bits. No weight gradient exists, so the
adapter alone is left in 16 or 32 bits.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafit.errors import ConfigError
from lorafit.model.linear import Frozen, LowRank, matmul, tile_workspace, with_low_rank
from lorafit.model.native import fits, kernels
from lorafit.model.ops import column_peaks, dequantize, quantize_rows

Quantize = Literal["none", "int8", "nf4", "fp8"]
_OUTLIER = 6.0  # a column is an outlier when its peak is so many times the median column's
_SMOOTHING = 0.5  # how far the columns of a weight are made equal: 0 not at all, 1 fully
_SAMPLED_ROWS = 256  # rows that are looked at for outliers: real ones sit in the same columns for every token
_SUMS = 6 * 2**20  # int32 sums alive at a time: they stay in the cache until they are scaled
_FP8_MAX = 448.0  # largest e4m3


@dataclass(frozen=True, slots=True)
class _Quantized:
    """Rows in int8, and the columns that int8 would have spoiled in their own type."""

    q: Tensor  # int8 (tokens, width)
    scale: Tensor  # float32 (tokens,)
    dtype: torch.dtype
    columns: Tensor | None  # int64 (outliers,)
    values: Tensor | None  # (tokens, outliers)


class Int8Linear(Frozen):
    """One int8 copy of the weight serves both directions.

    W[o, i] = weight[o, i] * scale[o] * balance[i]. `smooth_scale` makes the
    columns of the weight equally large and belongs to the input instead, so that columns which are small because
    their inputs are large keep their digits (the idea of SmoothQuant, Xiao et al., 2023, without its data). The
    factors that stand at the summed axis multiply before rounding, the others after summing, so the gradient is
    the exact one of the quantised weight. Columns that are still far larger than the others are multiplied in 16
    bits, as in LLM.int8() (Dettmers et al., 2022).
    """

    weight: Tensor  # int8 (out_features, in_features)
    scale: Tensor  # float32 (out_features,)
    smooth_scale: Tensor  # float32 (in_features,)

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.shape[1], weight.shape[0])
        peaks = column_peaks(weight).clamp(min=1e-30)
        smooth_scale = (peaks / peaks.median()) ** _SMOOTHING
        q, scale = quantize_rows(weight, 1 / smooth_scale)
        for name, buffer in (("weight", q), ("scale", scale), ("smooth_scale", smooth_scale)):
            self.register_buffer(name, buffer)

    def product(self, x: Tensor, addend: Tensor | None = None, low: LowRank | None = None) -> Tensor:
        x8 = _quantized(x, self.smooth_scale)
        start = with_low_rank(addend, low, transposed=False, in_place=False)
        out = _int8_product(x8, self.weight, self.scale, start, start if low is not None else None)
        if x8.columns is not None and x8.values is not None:
            few = self.weight[:, x8.columns].to(x.dtype) * self.scale[:, None].to(x.dtype)
            out.addmm_(x8.values * self.smooth_scale[x8.columns].to(x.dtype), few.t())
        return out if self.bias is None else out.add_(self.bias)

    def input_gradient(
        self, grad_output: Tensor, accumulate_into: Tensor | None = None, low: LowRank | None = None
    ) -> Tensor:
        grad_output8 = _quantized(grad_output, self.scale)
        start = with_low_rank(accumulate_into, low, transposed=True, in_place=True)
        out = _int8_product(grad_output8, self.weight, self.smooth_scale, start, start, transposed=True)
        if grad_output8.columns is not None and grad_output8.values is not None:
            few = self.weight[grad_output8.columns].to(grad_output.dtype) * self.smooth_scale.to(
                grad_output.dtype
            )
            out.addmm_(grad_output8.values * self.scale[grad_output8.columns].to(grad_output.dtype), few)
        return out

    def dequantize(self) -> Tensor:
        return self.weight * self.scale[:, None] * self.smooth_scale


def _quantized(x: Tensor, factor: Tensor) -> _Quantized:
    """x * factor in int8, rows scaled one by one, without the outlier columns (whose values are of x itself)."""
    if x.is_cuda:  # finding them would wait for the device
        return _Quantized(*quantize_rows(x, factor), x.dtype, None, None)
    every = max(1, x.shape[0] // _SAMPLED_ROWS)
    peaks = column_peaks(x, factor, every)
    columns = (peaks > _OUTLIER * peaks.median()).nonzero()[:, 0]
    if not len(columns):
        return _Quantized(*quantize_rows(x, factor), x.dtype, None, None)
    rest = factor.index_fill(0, columns, 0.0)
    return _Quantized(*quantize_rows(x, rest), x.dtype, columns, x[:, columns])


def _int8_product(
    x: _Quantized,
    weight: Tensor,
    column_scale: Tensor,
    addend: Tensor | None,
    out: Tensor | None,
    *,
    transposed: bool = False,
) -> Tensor:
    """x W^T, or with `transposed` x W, for int8 W (out_features, in_features), scaled, plus `addend`."""
    w = weight if transposed else weight.t()  # (depth, columns)
    rows, (depth, columns) = x.q.shape[0], w.shape
    out = torch.empty(rows, columns, dtype=x.dtype, device=w.device) if out is None else out
    if fits(out, x.scale) and (compiled := kernels()) and compiled.has_products and depth % 64 == 0:
        given = (x.q, x.scale, weight, int(transposed), column_scale, addend)
        compiled.call("int8_product", x.dtype, rows, depth, columns, *given, out, tile_workspace(rows, depth))
        return out
    step = max(64, _SUMS // columns // 64 * 64)  # a few rows of sums at a time
    for start in range(0, rows, step):
        part = slice(start, start + step)
        part_addend = None if addend is None else addend[part]
        dequantize(_sums(x.q[part], w), x.scale[part], column_scale, out[part], part_addend)
    return out


def _sums(a: Tensor, b: Tensor) -> Tensor:
    """int8 (rows, depth) x (depth, columns) -> int32. CUDA's wants more than 16 rows and column-major b."""
    if not a.is_cuda:
        return torch._int_mm(a, b)
    b = b if b.stride(0) == 1 else b.t().contiguous().t()
    short = max(0, 17 - a.shape[0])
    return torch._int_mm(F.pad(a, (0, 0, 0, short)), b)[: a.shape[0]]


class Fp8Linear(Frozen):
    """e4m3 weights with a scale for each row, one copy for each direction because the hardware wants it so."""

    weight: Tensor  # e4m3 (out_features, in_features)
    scale: Tensor  # float32 (out_features, 1)
    transposed: Tensor  # e4m3 (in_features, out_features)
    transposed_scale: Tensor  # float32 (in_features, 1)

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.shape[1], weight.shape[0])
        for name, (q, scale) in (("", _fp8(weight)), ("transposed", _fp8(weight.t().contiguous()))):
            self.register_buffer(name or "weight", q)
            self.register_buffer(f"{name}_scale".strip("_"), scale)

    def product(self, x: Tensor, addend: Tensor | None = None, low: LowRank | None = None) -> Tensor:
        out = _fp8_product(*_fp8(x), x.dtype, self.weight, self.scale)
        start = with_low_rank(addend, low, transposed=False, in_place=False)
        out = out if start is None else out.add_(start)
        return out if self.bias is None else out.add_(self.bias)

    def input_gradient(
        self, grad_output: Tensor, accumulate_into: Tensor | None = None, low: LowRank | None = None
    ) -> Tensor:
        out = _fp8_product(*_fp8(grad_output), grad_output.dtype, self.transposed, self.transposed_scale)
        start = with_low_rank(accumulate_into, low, transposed=True, in_place=True)
        return out if start is None else start.add_(out)

    def dequantize(self) -> Tensor:
        return self.weight.to(torch.float32) * self.scale


def _fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x as (e4m3, float32 scale of each row (rows, 1))."""
    scale = x.abs().amax(-1, keepdim=True).to(torch.float32).clamp(min=1e-30) / _FP8_MAX
    return (x / scale).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn), scale


def _fp8_product(x: Tensor, x_scale: Tensor, dtype: torch.dtype, w: Tensor, w_scale: Tensor) -> Tensor:
    # row-wise scales come out in bfloat16 only
    out = torch._scaled_mm(x, w.t(), scale_a=x_scale, scale_b=w_scale.t(), out_dtype=torch.bfloat16)
    return out.to(dtype)


class Nf4Linear(Frozen):
    """4-bit NormalFloat with double quantisation (QLoRA, Dettmers et al., 2023), unpacked for every product."""

    weight: Tensor  # packed, uint8

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.shape[1], weight.shape[0])
        packed, self._state = _bitsandbytes().quantize_4bit(
            weight, quant_type="nf4", compress_statistics=True
        )
        self.register_buffer("weight", packed)

    def product(self, x: Tensor, addend: Tensor | None = None, low: LowRank | None = None) -> Tensor:
        out = matmul(x, self.dequantize().to(x.dtype), addend, low)
        return out if self.bias is None else out.add_(self.bias)

    def input_gradient(
        self, grad_output: Tensor, accumulate_into: Tensor | None = None, low: LowRank | None = None
    ) -> Tensor:
        return matmul(
            grad_output,
            self.dequantize().to(grad_output.dtype),
            accumulate_into,
            low,
            transposed=True,
            in_place=True,
        )

    def dequantize(self) -> Tensor:
        out: Tensor = _bitsandbytes().dequantize_4bit(self.weight, self._state)
        return out


def _bitsandbytes() -> Any:
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)  # it speaks of kernels that it would like to download
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ImportError:
        raise ConfigError(
            "nf4 needs bitsandbytes", place="model.quantize", hint="pip install 'lorafit[nf4]'"
        ) from None
    finally:
        log.setLevel(level)


def check_quantize(quantize: Quantize, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ConfigError when this machine or number type cannot do it."""
    place = "model.quantize"
    if quantize == "int8" and device.type not in ("cpu", "cuda"):
        raise ConfigError(f"int8 has no product on {device.type}", place=place, hint="use none")
    if quantize == "fp8" and not (
        device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    ):
        hint = "use int8, which is fast on the CPU and on every CUDA chip"
        raise ConfigError("fp8 needs a CUDA chip of capability 8.9 or more", place=place, hint=hint)
    if quantize == "nf4":
        _bitsandbytes()
    if quantize != "none" and dtype == torch.float64:
        raise ConfigError(f"{quantize} with float64 makes no sense", place=place, hint="use none")


def quantized(quantize: Quantize, weight: Tensor) -> Frozen | None:
    """A frozen linear over `weight` (out_features, in_features), which is not kept; None for `none`."""
    made = {"int8": Int8Linear, "fp8": Fp8Linear, "nf4": Nf4Linear}
    return made[quantize](weight) if quantize != "none" else None
