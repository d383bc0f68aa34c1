"""Frozen linears in fewer bits, one class per quantisation: int8, fp8 and nf4, listed in QUANTIZERS.

int8 and fp8 follow SwitchBack (Wortsman et al., 2023): weights are quantised once, inputs and output gradients per
token in each pass, and both products run in 8 bits. There is no weight gradient. nf4 is dequantised for each product.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafit.config.schema import Quantize as Quantize
from lorafit.errors import ConfigError
from lorafit.model.compile import compilable
from lorafit.model.linear import Frozen, LowRank, matmul, tile_workspace, with_low_rank
from lorafit.model.native import fits, kernels
from lorafit.model.ops import column_peaks, dequantize, outlier_columns, quantize_rows

_PLACE = "model.quantize"
_OUTLIER = 4.0  # a column is an outlier if its peak is this many times the median column's
_SMOOTHING = 0.5  # how much the peaks of a weight's columns are equalised: 0 not at all, 1 fully
_CUDA_OUTLIERS = 16  # columns that count as outliers on CUDA, where their number must be known without a wait
_SAMPLED_ROWS = 256  # rows that are examined for outliers: real ones are in the same columns for every token
_SUMS = 6 * 2**20  # int32 sums alive at a time: they stay in the cache until they are scaled
_CUDA_SUMS = 2**25  # there each part costs launches
_FP8_MAX = 448.0  # largest e4m3


class QuantizedLinear(Frozen):
    """A frozen linear made from a weight (out_features, in_features), which it does not keep.

    A quantisation is one subclass, an entry of QUANTIZERS, and its name in config/schema.py.
    """

    bytes_per_weight: ClassVar[float]
    scale_bytes_per_weight: ClassVar = (
        0.0  # the part of it that stays on the device where layers are offloaded
    )
    shards: ClassVar = False  # whether FSDP can divide its buffers among the ranks

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.shape[1], weight.shape[0])

    @classmethod
    def check(cls, device: torch.device) -> None:
        """Raise ConfigError if it cannot run on `device`."""

    @staticmethod
    def working_bytes(rows: float, out_features: int, in_features: int, width: int, on_gpu: bool) -> float:
        """Temporary bytes of `input_gradient` for `rows` tokens; `width` is bytes per number of the compute type."""
        return 0.0


@dataclass(frozen=True, slots=True)
class _Quantized:
    """source * factor in int8; the outlier columns, which int8 would spoil, are zero in it and taken from `source`."""

    q: Tensor  # int8 (tokens, width)
    scale: Tensor  # float32 (tokens,)
    source: Tensor  # (tokens, width)
    factor: Tensor  # float32 (width,)
    columns: Tensor  # int64 (outliers,)


class Int8Linear(QuantizedLinear):
    """One int8 copy of the weight serves both directions.

    W[o, i] = weight[o, i] * scale[o] * smooth_scale[i]. `smooth_scale` equalises the columns of the weight and
    multiplies the input instead, so that columns which are small because their inputs are large keep their precision
    (as SmoothQuant, Xiao et al., 2023, but without calibration data). Factors of the summed axis multiply before
    rounding, the others after the sum, so the gradient is exactly that of the quantised weight. Columns of the input
    that are still far larger than the others are multiplied in 16 bits, as in LLM.int8() (Dettmers et al., 2022).
    """

    bytes_per_weight: ClassVar = 1.0
    shards: ClassVar = True

    weight: Tensor  # int8 (out_features, in_features)
    scale: Tensor  # float32 (out_features,)
    smooth_scale: Tensor  # float32 (in_features,)

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        peaks = column_peaks(weight).clamp(min=1e-30)
        smooth_scale = (peaks / peaks.median()) ** _SMOOTHING
        q, scale = quantize_rows(weight, 1 / smooth_scale)
        for name, buffer in (("weight", q), ("scale", scale), ("smooth_scale", smooth_scale)):
            self.register_buffer(name, buffer)

    @classmethod
    def check(cls, device: torch.device) -> None:
        if device.type not in ("cpu", "cuda"):
            raise ConfigError(f"int8 has no product on {device.type}", place=_PLACE, hint="use none")

    @staticmethod
    def working_bytes(rows: float, out_features: int, in_features: int, width: int, on_gpu: bool) -> float:
        return rows * (4 * in_features + out_features)  # int32 sums, the quantised gradient

    def decode_operands(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
        return self.weight, self.scale, self.smooth_scale

    def product(self, x: Tensor, addend: Tensor | None = None, low: LowRank | None = None) -> Tensor:
        x8 = _quantized(x, self.smooth_scale)
        start = with_low_rank(addend, low, transposed=False, in_place=False)
        out = _int8_product(x8, self.weight, self.scale, start, start if low is not None else None)
        return out if self.bias is None else out.add_(self.bias)

    def input_gradient(
        self, grad_output: Tensor, accumulate_into: Tensor | None = None, low: LowRank | None = None
    ) -> Tensor:
        gradient8 = _quantized(grad_output, self.scale)
        start = with_low_rank(accumulate_into, low, transposed=True, in_place=True)
        return _int8_product(gradient8, self.weight, self.smooth_scale, start, start, transposed=True)

    def dequantize(self) -> Tensor:
        return self.weight * self.scale[:, None] * self.smooth_scale


def _quantized(x: Tensor, factor: Tensor) -> _Quantized:
    """x * factor in int8 with a scale per row, without the outlier columns."""
    every = max(1, x.shape[0] // _SAMPLED_ROWS)
    if x.is_cuda:
        peaks = column_peaks(x, factor, every)
        columns = peaks.topk(min(_CUDA_OUTLIERS, len(peaks))).indices
        rest = factor.index_fill(0, columns, 0.0)
    else:
        columns, rest = outlier_columns(x, factor, _OUTLIER, every)
    return _Quantized(*quantize_rows(x, rest), x, factor, columns)


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
    w, dtype = weight if transposed else weight.t(), x.source.dtype  # (depth, columns)
    rows, (depth, columns), num_outliers = x.q.shape[0], w.shape, len(x.columns)
    out = torch.empty(rows, columns, dtype=dtype, device=w.device) if out is None else out
    if fits(out, x.scale) and (compiled := kernels()) and compiled.has_products and depth % 64 == 0:
        operands = (x.q, x.scale, weight, int(transposed), column_scale)
        outliers = (num_outliers, x.columns, x.source, x.factor, x.scale.new_empty(rows * num_outliers))
        sizes, workspace = (rows, depth, columns), tile_workspace(rows, depth)
        compiled.call("int8_product", dtype, *sizes, *operands, *outliers, addend, out, workspace)
        return out
    if w.is_cuda and w.stride(0) != 1:
        w = w.t().contiguous().t()  # CUDA multiplies by a column-major matrix only
    sums = _CUDA_SUMS if w.is_cuda else _SUMS
    step = max(64, sums // columns // 64 * 64)  # a few rows of sums at a time
    for start in range(0, rows, step):
        part = slice(start, start + step)
        part_addend = None if addend is None else addend[part]
        dequantize(_sums(x.q[part], w), x.scale[part], column_scale, out[part], part_addend)
    if num_outliers:
        rows_of = (weight if transposed else weight.t())[x.columns].to(dtype) * column_scale.to(dtype)
        out.addmm_(x.source[:, x.columns] * x.factor[x.columns].to(dtype), rows_of)
    return out


def _sums(a: Tensor, b: Tensor) -> Tensor:
    """int8 (rows, depth) x (depth, columns) -> int32. CUDA needs more than 16 rows."""
    if a.is_cuda and a.shape[0] < 17:
        return torch._int_mm(F.pad(a, (0, 0, 0, 17 - a.shape[0])), b)[: a.shape[0]]
    return torch._int_mm(a, b)


class Fp8Linear(QuantizedLinear):
    """e4m3 weights with a scale per row, and one copy per direction, as the hardware requires."""

    bytes_per_weight: ClassVar = 2.0
    streamed: ClassVar = ("weight", "transposed")

    weight: Tensor  # e4m3 (out_features, in_features)
    scale: Tensor  # float32 (out_features, 1)
    transposed: Tensor  # e4m3 (in_features, out_features)
    transposed_scale: Tensor  # float32 (in_features, 1)

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        for name, (q, scale) in (("", _fp8(weight)), ("transposed", _fp8(weight.t().contiguous()))):
            self.register_buffer(name or "weight", q)
            self.register_buffer(f"{name}_scale".strip("_"), scale)

    @classmethod
    def check(cls, device: torch.device) -> None:
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
            hint = "use int8, which is fast on the CPU and on every CUDA chip"
            raise ConfigError("fp8 needs a CUDA chip of capability 8.9 or more", place=_PLACE, hint=hint)

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


@compilable
def _fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x as (e4m3, float32 scale of each row (rows, 1))."""
    scale = x.abs().amax(-1, keepdim=True).to(torch.float32).clamp(min=1e-30) / _FP8_MAX
    return (x / scale).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn), scale


def _fp8_product(x: Tensor, x_scale: Tensor, dtype: torch.dtype, w: Tensor, w_scale: Tensor) -> Tensor:
    # row-wise scales come out in bfloat16 only
    out = torch._scaled_mm(x, w.t(), scale_a=x_scale, scale_b=w_scale.t(), out_dtype=torch.bfloat16)
    return out.to(dtype)


class Nf4Linear(QuantizedLinear):
    """4-bit NormalFloat with double quantisation (QLoRA, Dettmers et al., 2023), dequantised for every product."""

    bytes_per_weight: ClassVar = 0.516  # 4 bits, and a scale for every 64 weights, itself in 8 bits
    scale_bytes_per_weight: ClassVar = 0.016

    weight: Tensor  # packed, uint8

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        packed, self._state = _bitsandbytes().quantize_4bit(
            weight, quant_type="nf4", compress_statistics=True
        )
        self.register_buffer("weight", packed)

    @classmethod
    def check(cls, device: torch.device) -> None:
        _bitsandbytes()

    @staticmethod
    def working_bytes(rows: float, out_features: int, in_features: int, width: int, on_gpu: bool) -> float:
        return in_features * out_features * (width + 4 * (not on_gpu))  # a dequantised weight

    def product(self, x: Tensor, addend: Tensor | None = None, low: LowRank | None = None) -> Tensor:
        out = matmul(x, self.dequantize().to(x.dtype), addend, low)
        return out if self.bias is None else out.add_(self.bias)

    def input_gradient(
        self, grad_output: Tensor, accumulate_into: Tensor | None = None, low: LowRank | None = None
    ) -> Tensor:
        weight = self.dequantize().to(grad_output.dtype)
        return matmul(grad_output, weight, accumulate_into, low, transposed=True, in_place=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Nf4Linear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight.is_meta:  # the memory is freed, and the state's tensors are no buffers
            self._state = None
        return self

    def dequantize(self) -> Tensor:
        out: Tensor = _bitsandbytes().dequantize_4bit(self.weight, self._state)
        return out


def _bitsandbytes() -> Any:
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of kernels that it could download
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ImportError:
        raise ConfigError("nf4 needs bitsandbytes", place=_PLACE, hint="pip install 'lorafit[nf4]'") from None
    finally:
        log.setLevel(level)


QUANTIZERS: dict[str, type[QuantizedLinear]] = {"int8": Int8Linear, "nf4": Nf4Linear, "fp8": Fp8Linear}


def check_quantize(quantize: Quantize, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ConfigError if this device or number type cannot run it."""
    if quantize == "none":
        return
    QUANTIZERS[quantize].check(device)
    if dtype == torch.float64:
        raise ConfigError(f"{quantize} cannot be combined with float64", place=_PLACE, hint="use none")
