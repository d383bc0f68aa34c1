"""The definitions of row-wise operations and their gradients, in torch: what the kernels of CPU and GPU compute.

Tensors are (rows, width); sums and exponentials are float32, or float64 for float64 tensors. model/ops.py says what
each computes, and when; model/gpu_ops.py takes these where a kernel of the GPU does not compile.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafit.model.compile import compilable

_GELU, _GELU_CUBE = 2 * math.sqrt(2 / math.pi), 0.044715


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of sums."""
    return torch.promote_types(dtype, torch.float32)


@compilable
def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    x_wide = x.to(wide(x.dtype))
    rstd = torch.rsqrt(x_wide.square().mean(-1) + eps)
    return (x_wide * rstd[:, None] * shifted(weight, offset)).to(x.dtype), rstd


@compilable
def rms_norm_backward(grad_output: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float) -> Tensor:
    normed = x.to(wide(x.dtype)) * rstd[:, None]
    weighted = grad_output.to(normed.dtype) * shifted(weight, offset)
    projection = (weighted * normed).mean(-1, keepdim=True)
    return ((weighted - normed * projection) * rstd[:, None]).to(x.dtype)


def shifted(weight: Tensor, offset: float) -> Tensor:
    """weight + offset; a sum is made in the wide type, so that it is not rounded."""
    return weight.to(wide(weight.dtype)) + offset if offset else weight


@compilable
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return (F.silu(gate.to(wide(gate.dtype))) * up).to(gate.dtype)


@compilable
def swiglu_backward(grad_output: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad_output_wide, gate_wide = grad_output.to(wide(grad_output.dtype)), gate.to(wide(gate.dtype))
    sigmoid = torch.sigmoid(gate_wide)
    d_gate = grad_output_wide * up * sigmoid * (1 + gate_wide * (1 - sigmoid))
    return d_gate.to(gate.dtype), (grad_output_wide * gate_wide * sigmoid).to(up.dtype)


@compilable
def geglu(gate: Tensor, up: Tensor) -> Tensor:
    return (F.gelu(gate.to(wide(gate.dtype)), approximate="tanh") * up).to(gate.dtype)


@compilable
def geglu_backward(grad_output: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad_output_wide, gate_wide = grad_output.to(wide(grad_output.dtype)), gate.to(wide(gate.dtype))
    sigmoid = torch.sigmoid(_GELU * (gate_wide + _GELU_CUBE * gate_wide**3))
    slope = _GELU * (1 + 3 * _GELU_CUBE * gate_wide.square())
    d_gate = grad_output_wide * up * sigmoid * (1 + gate_wide * slope * (1 - sigmoid))
    return d_gate.to(gate.dtype), (grad_output_wide * gate_wide * sigmoid).to(up.dtype)


@compilable
def rotated(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """x (tokens, heads, head_dim) by the angles whose cosines and sines `rotary` has, (tokens, head_dim / 2) each."""
    cosine, sine = rotary[0][:, None], rotary[1][:, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).to(x.dtype)


@compilable
def quantize_rows(x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    scaled = x.to(torch.float32) * factor
    scale = scaled.abs().amax(-1) / 127
    return (scaled / scale.clamp(min=1e-30)[:, None]).round().to(torch.int8), scale


def dropout(x: Tensor, probability: float, seed: int, keys: Tensor | None = None) -> Tensor:
    """Some elements of x are zero and the others scaled, by `hashes` of the rows' keys, which are their numbers by
    default.
    """
    keys = torch.arange(x.shape[0], device=x.device) if keys is None else keys
    kept = hashes(seed, keys, x.shape[1]) >= threshold(probability)
    return (x * kept).mul_(1 / (1 - probability))


def threshold(probability: float) -> int:
    """The least hash of an element that dropout keeps."""
    return round(probability * 2**32)


def hashes(seed: int, keys: Tensor, width: int) -> Tensor:
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


def cross_entropy(logits: Tensor, targets: Tensor, grad_output: bool) -> Tensor:
    """The cross-entropy of each row (rows,). Overwrites `logits`, with the gradient if requested."""
    columns, numbers = targets[:, None], logits.to(wide(logits.dtype))
    peak = numbers.amax(-1, keepdim=True)
    of_targets = (numbers.gather(-1, columns) - peak)[:, 0]
    numbers.sub_(peak).exp_()  # in place: on a GPU each copy in float32 is twice the logits
    total = numbers.sum(-1, keepdim=True)
    if grad_output:
        probability = numbers.div_(total)
        logits.copy_(probability.scatter_add_(-1, columns, probability.new_full((), -1).expand_as(columns)))
    return total[:, 0].log() - of_targets


def times_weights(losses: Tensor, logits: Tensor, weights: Tensor | None) -> Tensor:
    """The losses of rows times their weights; `logits` has their gradients, which are multiplied in place."""
    if weights is None:
        return losses
    logits.mul_(weights[:, None])
    return losses * weights
