"""Row-wise operations of training, with their gradients: compiled kernels on the CPU if available, else torch.

model/definitions.py has the torch expressions (on a GPU each is one kernel, by model/gpu_ops.py or compiled); tests
compare the kernels of the CPU (model/native) and of the GPU with them. All tensors are (rows, width) and contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorafit.model import definitions, gpu_ops
from lorafit.model.definitions import wide
from lorafit.model.native import fits, kernels


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """(x / rms(x) * (weight + offset), 1 / rms(x) of each row) (Zhang and Sennrich, 2019)."""
    if fits(x, weight):
        y, rstd = torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32)
        _call("rms_norm", x, *x.shape, eps, offset, x, weight, y, rstd)
        return y, rstd
    if gpu_ops.ready(x):
        return gpu_ops.rms_norm(x, weight, eps, offset)
    return definitions.rms_norm(x, weight, eps, offset)


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
    return definitions.rms_norm_backward(grad_output, x, weight, rstd, offset)


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
    return gpu_ops.swiglu(gate, up) if gpu_ops.ready(gate) else _gated("swiglu", definitions.swiglu, gate, up)


def swiglu_backward(grad_output: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up. `grad_output` may be overwritten."""
    if gpu_ops.ready(gate):
        return gpu_ops.swiglu_backward(grad_output, gate, up)
    return _gated_backward("swiglu_backward", definitions.swiglu_backward, grad_output, gate, up)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, with the tanh form of GELU (Hendrycks and Gimpel, 2016)."""
    return _gated("geglu", definitions.geglu, gate, up)


def geglu_backward(grad_output: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up. `grad_output` may be overwritten."""
    return _gated_backward("geglu_backward", definitions.geglu_backward, grad_output, gate, up)


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


def outlier_columns(x: Tensor, factor: Tensor, limit: float, every: int) -> tuple[Tensor, Tensor]:
    """The columns whose peak of x * factor is more than `limit` times the median one's, and `factor` without them.

    (int64 (outliers,), float32 (width,) with zeros at the outliers); `factor` float32 (width,). The peaks are those of
    the first row and each `every`-th after it.
    """
    if fits(x):
        workspace = x.new_empty(torch.get_num_threads() + 2, x.shape[1], dtype=torch.float32)
        rest, found = torch.empty_like(factor), torch.empty(x.shape[1] + 1, dtype=torch.int64)
        sizes = (-(-x.shape[0] // every), x.shape[1], every, limit)
        _call("outlier_columns", x, *sizes, x, factor, workspace, rest, found)
        return found[1 : 1 + int(found[0])], rest
    peaks = column_peaks(x, factor, every)
    columns = (peaks > limit * peaks.median()).nonzero()[:, 0]
    return columns, factor.index_fill(0, columns, 0.0)


def quantize_rows(x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """x * factor as (int8, float32 scale of each row): symmetric, the largest of a row is 127. factor (width,)."""
    if fits(x):
        q, scale = torch.empty_like(x, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)
        _call("quantize_rows", x, *x.shape, x, factor, q, scale)
        return q, scale
    return definitions.quantize_rows(x, factor)


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
    if fits(x):
        y, threshold = torch.empty_like(x), definitions.threshold(probability)
        _call("dropout", x, *x.shape, seed, keys, threshold, scale, x, y)
        return y
    if x.device.type == "cpu":
        return definitions.dropout(x, probability, seed, keys)
    if gpu_ops.ready(x):
        return gpu_ops.dropout(x, probability, seed)
    generator = torch.Generator(x.device).manual_seed(seed)
    keep = torch.rand(x.shape, generator=generator, device=x.device) >= probability
    return (x * keep).mul_(scale)


def uniform(seed: int, keys: Tensor, width: int) -> Tensor:
    """Numbers from -1 to 1, float32 (tokens, width): a function of `seed`, the token's key int64 (tokens,) and the
    column, and the same on every device.
    """
    rows = [definitions.hashes(seed, part, width).to(torch.float32) for part in keys.split(_HASHED_ROWS)]
    return torch.cat(rows).mul_(2.0**-31).sub_(1)


_HASHED_ROWS = 256  # at a time: a hash is 64 bits wide


def cross_entropy(
    logits: Tensor, targets: Tensor, grad_output: bool, weights: Tensor | None = None
) -> Tensor:
    """The cross-entropy of each row, times its weight if given, (rows,) in the wide type. Overwrites `logits`, with the
    gradient if requested.
    """
    if gpu_ops.enabled() and logits.is_cuda:
        return gpu_ops.cross_entropy(logits, targets, grad_output, weights)
    if not fits(logits):
        losses = definitions.cross_entropy(logits, targets, grad_output)
    else:
        losses = logits.new_empty(len(targets), dtype=torch.float32)
        _call("cross_entropy", logits, *logits.shape, logits, targets, losses, int(grad_output))
    return definitions.times_weights(losses, logits, weights)


def _call(name: str, like: Tensor, *arguments: Tensor | int | float | None) -> None:
    compiled = kernels()
    assert compiled is not None
    compiled.call(name, like.dtype, *arguments)
