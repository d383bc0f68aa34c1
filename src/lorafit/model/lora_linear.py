"""Linears that share an input, with their low-rank paths: one hand-written forward and backward.

Autograd would save far more of a norm, an activation and several adapted linears than is needed to recompute them:
only the inputs and the low-rank products A x are saved. A frozen linear saves nothing. Variants of LoRA
(model/lora.py) are differentiated by autograd instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorafit.model.decode_linear import are_few, decode_linear
from lorafit.model.linear import Frozen, summed
from lorafit.model.memory import MUCH_FREE, release_free_memory
from lorafit.model.ops import (
    dropout,
    geglu,
    geglu_backward,
    rms_norm,
    rms_norm_backward,
    swiglu,
    swiglu_backward,
)


class LowRank(Protocol):
    """An adapted linear, as model/lora.py makes it: base plus scale * B A."""

    base: Frozen
    is_plain: bool
    lora_A: nn.Parameter  # (rank, in_features)
    lora_B: nn.Parameter  # (out_features, rank)
    scale: float
    dropout: float
    enabled: bool
    training: bool

    def added(self, x: Tensor, out: Tensor) -> Tensor: ...


class InputOp(Protocol):
    """How the linears' input y is computed from the saved tensors."""

    def make(self, *inputs: Tensor) -> Tensor: ...

    def backward(self, grad_output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The gradients of the inputs; `grad_output` may be overwritten."""
        ...


class Identity:
    """y = x."""

    def make(self, *inputs: Tensor) -> Tensor:
        return inputs[0]

    def backward(self, grad_output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (grad_output,)


@dataclass(frozen=True, slots=True)
class RmsNormInput:
    """y = RMSNorm(x), by the weight plus `offset`."""

    weight: Tensor
    eps: float
    offset: float = 0.0

    def make(self, *inputs: Tensor) -> Tensor:
        return rms_norm(inputs[0], self.weight, self.eps, self.offset)[0]

    def backward(self, grad_output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        _, rstd = rms_norm(inputs[0], self.weight, self.eps, self.offset)
        return (rms_norm_backward(grad_output, inputs[0], self.weight, rstd, self.offset),)


class SwigluInput:
    """y = silu(gate) * up."""

    def make(self, *inputs: Tensor) -> Tensor:
        return swiglu(*inputs)

    def backward(self, grad_output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return swiglu_backward(grad_output, *inputs)


class GegluInput:
    """y = gelu(gate) * up."""

    def make(self, *inputs: Tensor) -> Tensor:
        return geglu(*inputs)

    def backward(self, grad_output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return geglu_backward(grad_output, *inputs)


def project(
    linears: Sequence[nn.Module],
    source: InputOp,
    *inputs: Tensor,
    residual: Tensor | None = None,
    keys: Tensor | None = None,
    widths: Sequence[int] = (),
) -> tuple[Tensor, ...]:
    """The outputs of `linears` (each Frozen or adapted) for the input that `source` makes of `inputs`.

    inputs (tokens, width), outputs (tokens, out_features). `residual` is added to the output of the one linear.
    Adapted linears of one call have the same dropout mask; `keys` int64 (tokens,) identify the tokens for it. The
    output of one linear in the place of several is split into `widths`.
    """
    outs = _project(linears, source, inputs, residual, keys)
    if len(widths) <= len(outs):
        return outs
    return tuple(part.contiguous() for part in outs[0].split(tuple(widths), dim=-1))


def _project(
    linears: Sequence[nn.Module],
    source: InputOp,
    inputs: Sequence[Tensor],
    residual: Tensor | None,
    keys: Tensor | None,
) -> tuple[Tensor, ...]:
    if are_few(linears, inputs[0]):
        y = source.make(*inputs)
        return tuple(decode_linear(linear, y, residual) for linear in linears)
    if any(getattr(linear, "pairs", None) is not None for linear in linears):  # model/multi_lora.py
        y = source.make(*inputs)
        products = [getattr(linear, "mixed", None) or linear.product for linear in linears]
        return tuple(product(y, residual) for product in products)  # type: ignore[operator]
    group = _Group(linears, source)
    adapted = group.adapted()
    drop = None
    if adapted and adapted[0].training and adapted[0].dropout:
        seed = int(torch.randint(2**62, ()))  # from torch's generator, whose state a checkpoint holds
        drop = _Dropout(adapted[0].dropout, seed, keys)
    if not all(linear.is_plain for linear in adapted):
        return _by_autograd(group, residual, drop, *inputs)
    adapter_parameters = [parameter for linear in adapted for parameter in (linear.lora_A, linear.lora_B)]
    out: tuple[Tensor, ...] = _Project.apply(group, residual, drop, len(inputs), *inputs, *adapter_parameters)  # type: ignore[no-untyped-call]
    return out


def _by_autograd(
    group: _Group, residual: Tensor | None, drop: _Dropout | None, *inputs: Tensor
) -> tuple[Tensor, ...]:
    """The same for any variant: base and input as above, `added` differentiated by autograd."""
    y: Tensor = _Input.apply(group.source, *inputs)  # type: ignore[no-untyped-call]
    x: Tensor = y if drop is None else _Input.apply(drop, y)  # type: ignore[no-untyped-call]
    outs = []
    for base, linear in zip(group.bases, group.low_ranks, strict=True):
        (out,) = project((base,), Identity(), y)
        if linear is not None:
            out = out + linear.added(x, out)
        outs.append(out if residual is None else out + residual)
    return tuple(outs)


class _Input(torch.autograd.Function):
    """An InputOp as a differentiable function."""

    @staticmethod
    def forward(ctx: Any, source: InputOp, *inputs: Tensor) -> Tensor:
        ctx.source = source
        ctx.save_for_backward(*inputs)
        return source.make(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_output = grad_outputs[0].clone(memory_format=torch.contiguous_format)  # it may be overwritten
        return (None, *ctx.source.backward(grad_output, *ctx.saved_tensors))


class _Group:
    def __init__(self, linears: Sequence[Any], source: InputOp) -> None:
        self.source = source
        self.bases: list[Frozen] = [getattr(linear, "base", linear) for linear in linears]
        self.low_ranks: list[LowRank | None] = [
            linear if getattr(linear, "enabled", False) else None for linear in linears
        ]

    def adapted(self) -> list[LowRank]:
        return [linear for linear in self.low_ranks if linear is not None]


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        group: _Group,
        residual: Tensor | None,
        drop: _Dropout | None,
        num_inputs: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        inputs, adapter_parameters = tensors[:num_inputs], tensors[num_inputs:]
        y = group.source.make(*inputs)
        low = None
        if adapted := group.adapted():
            a = torch.cat(adapter_parameters[::2]).to(y.dtype)  # (all ranks, in_features)
            low = F.linear(y if drop is None else drop.make(y), a).mul_(_scale(adapted, y))
        lows = iter(zip(_split(low, adapted), adapter_parameters[1::2], strict=True))
        outs = []
        for base, linear in zip(group.bases, group.low_ranks, strict=True):
            pair = None
            if linear is not None:
                part, b = next(lows)
                pair = part.contiguous(), b.to(y.dtype)
            outs.append(base.product(y, residual, pair))
        ctx.group, ctx.num_inputs, ctx.drop = group, num_inputs, drop
        needs_inputs = adapted or not isinstance(group.source, Identity)
        ctx.save_for_backward(low, *(inputs if needs_inputs else [None] * num_inputs), *adapter_parameters)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        group: _Group = ctx.group
        drop: _Dropout | None = ctx.drop
        low, *tensors = ctx.saved_tensors
        inputs, adapter_parameters = tensors[: ctx.num_inputs], tensors[ctx.num_inputs :]
        needs_inputs = any(ctx.needs_input_grad[4 : 4 + ctx.num_inputs])
        release_free_memory(MUCH_FREE)
        adapted = group.adapted()
        lows = iter(zip(_split(low, adapted), adapter_parameters[::2], adapter_parameters[1::2], strict=True))
        dy: Tensor | None = None
        d_b, d_lows = [], []
        for base, linear, grad_output in zip(group.bases, group.low_ranks, grad_outputs, strict=True):
            grad_output, pair = grad_output.contiguous(), None
            if linear is not None:
                part, a, b = next(lows)
                d_b.append(summed(grad_output, part).to(b.dtype))
                d_lows.append((grad_output @ b.to(grad_output.dtype)).mul_(linear.scale))
                if drop is None:
                    pair = d_lows[-1], a.to(grad_output.dtype)
            if needs_inputs:
                dy = base.input_gradient(grad_output, dy, pair)
        d_parameters: list[Tensor] = []
        if adapted:
            d_low = torch.cat(d_lows, dim=1)  # (tokens, all ranks)
            y = group.source.make(*inputs)
            d_a = summed(d_low, y if drop is None else drop.make(y)).to(adapter_parameters[0].dtype)
            del y
            if dy is not None and drop is not None:
                dy += drop.make(d_low @ torch.cat(adapter_parameters[::2]).to(dy.dtype))
            for part, b in zip(d_a.split([m.shape[0] for m in adapter_parameters[::2]]), d_b, strict=True):
                d_parameters += [part, b]
        d_inputs: Sequence[Tensor | None] = [None] * ctx.num_inputs
        if dy is not None:
            d_inputs = group.source.backward(dy, *inputs)
        residual = grad_outputs[0] if ctx.needs_input_grad[1] else None
        return (None, residual, None, None, *d_inputs, *d_parameters)


def _scale(adapted: Sequence[LowRank], like: Tensor) -> Tensor | float:
    """The factor of each column of the low-rank products of `adapted`; one number if it is the same for all."""
    scales = [linear.scale for linear in adapted]
    if len(set(scales)) == 1:
        return scales[0]
    return torch.cat([like.new_full((len(linear.lora_A),), linear.scale) for linear in adapted])


def _split(low: Tensor | None, adapted: Sequence[LowRank]) -> Sequence[Tensor]:
    return low.split([linear.lora_A.shape[0] for linear in adapted], dim=1) if low is not None else ()


@dataclass(frozen=True, slots=True)
class _Dropout:
    """Dropout of the shared input of one group; an InputOp, with the same mask in both directions."""

    probability: float
    seed: int
    keys: Tensor | None

    def make(self, *inputs: Tensor) -> Tensor:
        return dropout(inputs[0], self.probability, self.seed, self.keys)

    def backward(self, grad_output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (self.make(grad_output),)
