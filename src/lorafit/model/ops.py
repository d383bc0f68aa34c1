"""Row-wise operations of training, with their gradients: compiled kernels on the CPU if available, else torch.

The torch expressions are the definition (on a GPU each is one kernel, by model/gpu_ops.py or compiled); tests
compare the kernels of the CPU (model/native) and of the GPU with them. All tensors are (rows, width) and contiguous;
sums and exponentials are float32, or float64 for float64 tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorafit.model import gpu_ops
from lorafit.model.compile import compilable
from lorafit.model.native import fits, kernels

_GELU, _GELU_CUBE = 2 * math.sqrt(2 / math.pi), 0.044715


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of sums."""
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """(x / rms(x) * (weight + offset), 1 / rms(x) of each row) (Zhang and Sennrich, 2019)."""
    if fits(x, weight):
        y, rstd = torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32)
        _call("rms_norm", x, *x.shape, eps, offset, x, weight, y, rstd)
        return y, rstd
    if gpu_ops.ready(x):
        return gpu_ops.rms_norm(x, weight, eps, offset)
    return _rms_norm(x, weight, eps, offset)


@compilable
def _rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    x_wide = x.to(wide(x.dtype))
    rstd = torch.rsqrt(x_wide.square().mean(-1) + eps)
    return (x_wide * rstd[:, None] * _shifted(weight, offset)).to(x.dtype), rstd


def rms_norm_backward(
    grad_output: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float = 0.0
) -> Tensor:
    """The gradient of x from that of the norm."""
    if fits(grad_output, x, weight):
        into = torch.empty_like(x)
        _call("rms_norm_backward", x, *x.shape, offset, grad_output, x, weight, rstd, into)
        return into
    if gpu_ops.ready(x):
        return gpu_ops.rms_norm_backward(grad_output, x, weight, rstd, offset)
    return _rms_norm_backward(grad_output, x, weight, rstd, offset)


@compilable
def _rms_norm_backward(grad_output: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float) -> Tensor:
    normed = x.to(wide(x.dtype)) * rstd[:, None]
    weighted = grad_output.to(normed.dtype) * _shifted(weight, offset)
    projection = (weighted * normed).mean(-1, keepdim=True)
    return ((weighted - normed * projection) * rstd[:, None]).to(x.dtype)


def _shifted(weight: Tensor, offset: float) -> Tensor:
    """weight + offset; a sum is made in the wide type, so that it is not rounded."""
    return weight.to(wide(weight.dtype)) + offset if offset else weight


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        y, rstd = rms_norm(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight, rstd = ctx.saved_tensors
        into = rms_norm_backward(grad_outputs[0].contiguous(), x, weight, rstd, ctx.offset)
        return into, None, None, None


def norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """RMSNorm over the last axis with a frozen weight, differentiable in x; saves x and one number per row."""
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = _Norm.apply(rows.contiguous(), weight, eps, offset)  # type: ignore[no-untyped-call]
    return out.view(x.shape)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return gpu_ops.swiglu(gate, up) if gpu_ops.ready(gate) else _gated("swiglu", _swiglu, gate, up)


@compilable
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return (F.silu(gate.to(wide(gate.dtype))) * up).to(gate.dtype)


def swiglu_backward(grad_output: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up. `grad_output` may be overwritten."""
    if gpu_ops.ready(gate):
        return gpu_ops.swiglu_backward(grad_output, gate, up)
    return _gated_backward("swiglu_backward", _swiglu_backward, grad_output, gate, up)


@compilable
def _swiglu_backward(grad_output: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad_output_wide, gate_wide = grad_output.to(wide(grad_output.dtype)), gate.to(wide(gate.dtype))
    sigmoid = torch.sigmoid(gate_wide)
    d_gate = grad_output_wide * up * sigmoid * (1 + gate_wide * (1 - sigmoid))
    return d_gate.to(gate.dtype), (grad_output_wide * gate_wide * sigmoid).to(up.dtype)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, with the tanh form of GELU (Hendrycks and Gimpel, 2016)."""
    return _gated("geglu", _geglu, gate, up)


@compilable
def _geglu(gate: Tensor, up: Tensor) -> Tensor:
    return (F.gelu(gate.to(wide(gate.dtype)), approximate="tanh") * up).to(gate.dtype)


def geglu_backward(grad_output: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up. `grad_output` may be overwritten."""
    return _gated_backward("geglu_backward", _geglu_backward, grad_output, gate, up)


@compilable
def _geglu_backward(grad_output: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad_output_wide, gate_wide = grad_output.to(wide(grad_output.dtype)), gate.to(wide(gate.dtype))
    sigmoid = torch.sigmoid(_GELU * (gate_wide + _GELU_CUBE * gate_wide**3))
    slope = _GELU * (1 + 3 * _GELU_CUBE * gate_wide.square())
    d_gate = grad_output_wide * up * sigmoid * (1 + gate_wide * slope * (1 - sigmoid))
    return d_gate.to(gate.dtype), (grad_output_wide * gate_wide * sigmoid).to(up.dtype)


def add_scaled(x: Tensor, y: Tensor, factor: float) -> Tensor:
    """x + factor * y."""
    if torch.is_inference_mode_enabled() and fits(
        x, y
    ):  # a decode pass is kernels alone (infer/recorded_pass.py)
        out = torch.empty_like(x)
        _call("add_scaled", x, *x.shape, float(factor), x, y, out)
        return out
    return torch.add(x, y, alpha=factor)


def _gated(kernel: str, definition: Callable[[Tensor, Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    if fits(gate, up):
        out = torch.empty_like(gate)
        _call(kernel, gate, *gate.shape, gate, up, out)
        return out
    return definition(gate, up)


def _gated_backward(
    kernel: str,
    definition: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    grad_output: Tensor,
    gate: Tensor,
    up: Tensor,
) -> tuple[Tensor, Tensor]:
    if fits(grad_output, gate, up):
        d_up = torch.empty_like(up)
        _call(kernel, gate, *gate.shape, grad_output, gate, up, grad_output, d_up)
        return grad_output, d_up
    return definition(grad_output, gate, up)


def column_peaks(x: Tensor, factor: Tensor | None = None, every: int = 1) -> Tensor:
    """Largest |x * factor| of each column, float32 (width,), of the first row and each `every`-th after it."""
    if fits(x):
        workspace = x.new_empty(torch.get_num_threads(), x.shape[1], dtype=torch.float32)
        peaks = torch.empty_like(workspace[0])
        _call("column_peaks", x, -(-x.shape[0] // every), x.shape[1], every, x, factor, workspace, peaks)
        return peaks
    peaks = x[::every].abs().amax(0).to(torch.float32)
    return peaks if factor is None else peaks * factor


def quantize_rows(x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """x * factor as (int8, float32 scale of each row): symmetric, the largest of a row is 127. factor (width,)."""
    if fits(x):
        q, scale = torch.empty_like(x, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)
        _call("quantize_rows", x, *x.shape, x, factor, q, scale)
        return q, scale
    return _quantize_rows(x, factor)


@compilable
def _quantize_rows(x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    scaled = x.to(torch.float32) * factor
    scale = scaled.abs().amax(-1) / 127
    return (scaled / scale.clamp(min=1e-30)[:, None]).round().to(torch.int8), scale


def dequantize(
    sums: Tensor, row_scale: Tensor, column_scale: Tensor, out: Tensor, addend: Tensor | None = None
) -> None:
    """Write sums int32 (rows, width) times both scales, plus `addend`, to `out`; the two may be the same tensor."""
    if fits(out, row_scale):
        _call("dequantize", out, *sums.shape, sums, row_scale, column_scale, addend, out)
        return
    scaled = sums.to(wide(out.dtype)).mul_(row_scale[:, None]).mul_(column_scale)
    out.copy_(scaled if addend is None else scaled.add_(addend))


def dropout(x: Tensor, probability: float, seed: int, keys: Tensor | None = None) -> Tensor:
    """Dropout: some elements of x are zero and the others scaled; a function of `seed` and each row's key selects them.

    So no mask is saved: the backward pass computes the same one again. `keys` int64 (rows,) make the mask of a token
    independent of its position; by default they are the row numbers. On devices other than the CPU the mask is a
    function of `seed` and the shape alone, another with Triton's kernels than without them.
    """
    scale = 1 / (1 - probability)
    threshold = round(probability * 2**32)
    if fits(x):
        y = torch.empty_like(x)
        _call("dropout", x, *x.shape, seed, keys, threshold, scale, x, y)
        return y
    if x.device.type == "cpu":
        keys = torch.arange(x.shape[0]) if keys is None else keys
        return (x * (_hashes(seed, keys, x.shape[1]) >= threshold)).mul_(scale)
    if gpu_ops.ready(x):
        return gpu_ops.dropout(x, probability, seed)
    generator = torch.Generator(x.device).manual_seed(seed)
    keep = torch.rand(x.shape, generator=generator, device=x.device) >= probability
    return (x * keep).mul_(scale)


def uniform(seed: int, keys: Tensor, width: int) -> Tensor:
    """Numbers from -1 to 1, float32 (tokens, width): a function of `seed`, the token's key int64 (tokens,) and the
    column, and the same on every device.
    """
    rows = [_hashes(seed, part, width).to(torch.float32) for part in keys.split(_HASHED_ROWS)]
    return torch.cat(rows).mul_(2.0**-31).sub_(1)


_HASHED_ROWS = 256  # at a time: a hash is 64 bits wide


def _hashes(seed: int, keys: Tensor, width: int) -> Tensor:
    """A number below 2**32 for each token and column, as in the compiled kernel: int64 products that wrap around."""

    def signed(number: int) -> int:
        return (number & (2**64 - 1)) - ((number & 2**63) << 1)

    key = signed(seed) + (keys + 1) * signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        key = (key ^ ((key >> shift) & (2 ** (64 - shift) - 1))) * signed(factor)
    low = 2**32 - 1
    h = ((key[:, None] >> 32) + torch.arange(width, device=keys.device) * 0x9E3779B9) & low
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        h = ((h ^ (h >> shift)) * factor) & low
    return h ^ (h >> 16)


def cross_entropy(
    logits: Tensor, targets: Tensor, grad_output: bool, weights: Tensor | None = None
) -> Tensor:
    """The cross-entropy of each row, times its weight if given, (rows,) in the wide type. Overwrites `logits`, with the
    gradient if requested.
    """
    if gpu_ops.enabled() and logits.is_cuda:
        return gpu_ops.cross_entropy(logits, targets, grad_output, weights)
    losses = _cross_entropy(logits, targets, grad_output)
    if weights is not None:
        losses = losses * weights
        logits.mul_(weights[:, None])
    return losses


def _cross_entropy(logits: Tensor, targets: Tensor, grad_output: bool) -> Tensor:
    if fits(logits):
        losses = logits.new_empty(len(targets), dtype=torch.float32)
        _call("cross_entropy", logits, *logits.shape, logits, targets, losses, int(grad_output))
        return losses
    columns, numbers = targets[:, None], logits.to(wide(logits.dtype))
    peak = numbers.amax(-1, keepdim=True)
    of_targets = (numbers.gather(-1, columns) - peak)[:, 0]
    numbers.sub_(peak).exp_()  # in place: on a GPU each copy in float32 is twice the logits
    total = numbers.sum(-1, keepdim=True)
    if grad_output:
        probability = numbers.div_(total)
        logits.copy_(probability.scatter_add_(-1, columns, probability.new_full((), -1).expand_as(columns)))
    return total[:, 0].log() - of_targets


def _call(name: str, like: Tensor, *arguments: Tensor | int | float | None) -> None:
    compiled = kernels()
    assert compiled is not None
    compiled.call(name, like.dtype, *arguments)
