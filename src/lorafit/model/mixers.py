"""What mixes the tokens in a layer: the modules of model/mixer_shapes.py, listed in MIXERS.

A mixer gets the residual stream and gives the tensors of which its `result` makes what the layer's output linear
multiplies. What it needs of other tokens it asks the pass (`attend`), which knows where documents begin and what a
cache holds (model/attention.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafit.model.architecture import Architecture
from lorafit.model.attention import Attend, Rotary, normed, rotate
from lorafit.model.definitions import wide
from lorafit.model.gpu_ops import HeadNorms
from lorafit.model.linear import Linear
from lorafit.model.lora_linear import Identity, InputOp, project
from lorafit.model.ops import norm, rms_norm, rms_norm_backward, swiglu, swiglu_backward
from lorafit.model.rope import Rope


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis with a frozen weight, to which `offset` is added."""

    def __init__(self, size: int, arch: Architecture) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = arch.rms_norm_eps
        self.offset = arch.family.norm_offset

    def forward(self, x: Tensor) -> Tensor:  # (..., size)
        return norm(x, self.weight, self.eps, self.offset)


def add_linears(module: nn.Module, shapes: Iterable[tuple[str, tuple[int, int]]], bias: bool) -> None:
    """Put linears into `module`, by their names and (out_features, in_features)."""
    for name, (out_features, in_features) in shapes:
        module.add_module(name, Linear(in_features, out_features, bias))


def linears_of(module: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The linears `names`, adapted or not."""
    return [getattr(module, name) for name in names]


class Product:
    """y = a * b."""

    def make(self, *inputs: Tensor) -> Tensor:
        return inputs[0] * inputs[1]

    def backward(self, grad_output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return grad_output * inputs[1], grad_output * inputs[0]


class SigmoidGate:
    """y = x * sigmoid(gate)."""

    def make(self, *inputs: Tensor) -> Tensor:
        return inputs[0] * inputs[1].sigmoid()

    def backward(self, grad_output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        opened = inputs[1].sigmoid()
        return grad_output * opened, grad_output * inputs[0] * opened * (1 - opened)


class GatedNorm:
    """y = RMSNorm of each head of x * silu(gate)."""

    def __init__(self, norm: RMSNorm) -> None:
        self.norm = norm

    def make(self, *inputs: Tensor) -> Tensor:
        return swiglu(inputs[1], self._normed(inputs[0])[0].view_as(inputs[0]))

    def backward(self, grad_output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        x, gate = inputs
        normed, rstd = self._normed(x)
        d_gate, d_normed = swiglu_backward(grad_output, gate, normed.view_as(x))
        heads = d_normed.view_as(normed), x.view_as(normed)
        return rms_norm_backward(*heads, self.norm.weight, rstd).view_as(x), d_gate

    def _normed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm(x.view(-1, len(self.norm.weight)), self.norm.weight, self.norm.eps)


class Mixer(Protocol):
    """A token mixer; `result` makes the input of the output linear of the tensors that `forward` gives."""

    result: InputOp

    def __init__(self, arch: Architecture, layer: int) -> None: ...

    def forward(
        self, x: Tensor, before: InputOp, rotary: Rotary, attend: Attend, keys: Tensor | None = None
    ) -> tuple[Tensor, ...]: ...


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, arch: Architecture, layer: int) -> None:
        super().__init__()
        family = arch.family
        self.layer = layer
        self.head_dim = arch.head_dim
        self.window = arch.windows[layer] if arch.windows else None
        *inputs, output = arch.mixer_linears(layer).items()
        self.inputs = [name for name, _ in inputs]
        add_linears(self, inputs, bias=arch.qkv_bias)
        add_linears(self, [output], bias=arch.o_bias)
        q_width, kv_width = arch.num_attention_heads * arch.head_dim, arch.num_key_value_heads * arch.head_dim
        self.widths = (q_width, kv_width, kv_width)  # of a fused linear
        self.qk_norm = family.qk_norm
        self.norm_names = [family.name(name) for name in ("q_norm", "k_norm")]
        if self.qk_norm != "none":
            widths = self.widths if self.qk_norm == "width" else (arch.head_dim, arch.head_dim)
            for name, width in zip(self.norm_names, widths, strict=False):
                self.add_module(name, RMSNorm(width, arch))
        self.interleaved, self.rotary_dim = family.interleaved_rotary, arch.rotary_dim
        self.rope, self.cap = arch.rope, arch.attention_cap
        self.has_gate = family.gated_attention
        self.result: InputOp = SigmoidGate() if self.has_gate else Identity()

    def forward(
        self, x: Tensor, before: InputOp, rotary: Rotary, attend: Attend, keys: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """The concatenated outputs of the heads and their gates, if they have some, (tokens, heads * head_dim)."""
        q, k, v = project(linears_of(self, self.inputs), before, x, keys=keys, widths=self.widths)
        gate: tuple[Tensor, ...] = ()
        if self.has_gate:  # a head's query and gate are side by side
            q, gate_of_heads = q.unflatten(-1, (-1, 2, self.head_dim)).unbind(-2)
            q, gate = q.flatten(-2), (gate_of_heads.flatten(-2),)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))  # (tokens, heads, head_dim)
        norms, norms_follow = self.norms(), self.qk_norm == "rotated_head"
        if self.interleaved or self.rotary_dim is not None:
            if not norms_follow:
                (q, k), norms = normed(q, k, norms), None
            q, k = (in_halves(part, self.rotary_dim, self.interleaved) for part in (q, k))
        if norms_follow:
            q, k = rotate(q, rotary), rotate(k, rotary)
            rotary = torch.ones_like(rotary[0]), torch.zeros_like(rotary[1])
        if self.rope.query_beta:
            (q, k), norms = normed(q, k, norms), None
            q = q * query_factor(attend.positions, self.rope).to(q.dtype)[:, None, None]
        return (attend(self.layer, q, k, v, rotary, self.window, self.cap, norms).flatten(-2), *gate)

    def norms(self) -> HeadNorms | None:
        """The norms of queries and keys, None if there are none."""
        if self.qk_norm == "none":
            return None
        q_norm, k_norm = (getattr(self, name) for name in self.norm_names)
        return HeadNorms((q_norm.weight, k_norm.weight), q_norm.eps, q_norm.offset)


class Taps(nn.Module):
    """The frozen weight of a causal depthwise convolution, (channels, 1, width); the last tap is the token itself."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))


class ShortConvolution(nn.Module):
    """LFM2's gated short convolution: gate * convolution(other gate * x)."""

    def __init__(self, arch: Architecture, layer: int) -> None:
        super().__init__()
        self.layer = layer
        shapes = arch.mixer_linears(layer)
        self.inputs, self.widths = ["in_proj"], (arch.hidden_size,) * 3
        self.conv = Taps(arch.hidden_size, arch.conv_width)
        add_linears(self, shapes.items(), bias=False)
        self.result: InputOp = Product()

    def forward(
        self, x: Tensor, before: InputOp, rotary: Rotary, attend: Attend, keys: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """The gate and what it multiplies, (tokens, hidden_size) each."""
        inner, outer, x = project(linears_of(self, self.inputs), before, x, keys=keys, widths=self.widths)
        return outer, attend.convolve(self.layer, inner * x, self.conv.weight)


class GatedDelta(nn.Module):
    """Qwen3.5's linear attention: a gated delta rule behind a convolution, with a norm and a gate of each head."""

    def __init__(self, arch: Architecture, layer: int) -> None:
        super().__init__()
        assert arch.delta is not None
        self.layer, self.heads = layer, arch.delta
        self.conv1d = Taps(arch.delta.channels, arch.conv_width)
        self.dt_bias = nn.Parameter(torch.empty(arch.delta.values))
        self.A_log = nn.Parameter(torch.empty(arch.delta.values))
        self.norm = RMSNorm(arch.delta.value_dim, arch)
        self.norm.offset = 0.0
        *self.inputs, _ = shapes = arch.mixer_linears(layer)
        add_linears(self, shapes.items(), bias=False)
        self.result: InputOp = GatedNorm(self.norm)

    def forward(
        self, x: Tensor, before: InputOp, rotary: Rotary, attend: Attend, keys: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """What the rule says, and its gate, (tokens, value heads * value_dim) each."""
        qkv, z, b, a = project(linears_of(self, self.inputs), before, x, keys=keys)
        qkv = F.silu(attend.convolve(self.layer, qkv, self.conv1d.weight))
        number = wide(a.dtype)
        decay = -self.A_log.to(number).exp() * F.softplus(a.to(number) + self.dt_bias)
        return attend.delta(self.layer, qkv, decay, b.sigmoid(), self.heads), z


MIXERS: dict[str, type[Mixer]] = {
    "attention": Attention,
    "conv": ShortConvolution,
    "delta": GatedDelta,
}


def query_factor(positions: Tensor, rope: Rope) -> Tensor:
    """The factor of the query at each position, float32 (tokens,): 1 within the original length."""
    turns = torch.floor(positions / rope.original_max_position_embeddings)
    return 1 + rope.query_beta * torch.log(1 + turns)


def in_halves(x: Tensor, rotary_dim: int | None, interleaved: bool) -> Tensor:
    """x (tokens, heads, head_dim) in an order in which the pairs of a head are its halves.

    Queries and keys have the same order, so scores stay as they are. Pairs are neighbours if `interleaved`, else the
    halves of the first `rotary_dim` numbers; the others come after the first and the second of the pairs.
    """
    if interleaved:
        pairs: Tensor = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return pairs
    assert rotary_dim is not None
    rest = (x.shape[-1] - rotary_dim) // 2
    first, second, third, fourth = x.split((rotary_dim // 2, rotary_dim // 2, rest, rest), dim=-1)
    return torch.cat((first, third, second, fourth), dim=-1)
