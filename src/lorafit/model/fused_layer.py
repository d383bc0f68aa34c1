"""A decoder layer on a GPU in few kernels: merged products (model/merged.py) and Triton's kernels between them.

Two hand-written passes stand around the attention: norm, queries, keys, values and their rotation before it; all else
after it. They save what the passes of model/lora_linear.py save. The gradient of the residual stream goes through
both, so that no addition of its own is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorafit.model import gpu_ops
from lorafit.model.attention import Attend, PackedDocuments, Rotary
from lorafit.model.lora_linear import Identity, SwigluInput
from lorafit.model.merged import Merged, mergeable
from lorafit.model.mixers import Attention, linears_of
from lorafit.model.places import Layout


def start_kernels(network: Any, device: torch.device, *, sharded: bool) -> str:
    """Let Triton's kernels compute on CUDA, and fuse the layers, unless other ranks hold a part of them.

    Returns what the log of a run says of it: nothing on other devices.
    """
    why = gpu_ops.enable(device)
    if why:
        return f"the operations between products are torch's, which is slower: {why}"
    if not gpu_ops.enabled():
        return ""
    layers = len(network.decoder.layers)
    fused = 0 if sharded else fuse_layers(network)
    return f"Triton's kernels run between the products; {fused} of {layers} layers have merged products"


def fuse_layers(network: Any) -> int:
    """Merge the linears of all layers that allow it; returns their number. Layers on the host keep their own."""
    if network.streamed is not None:
        return 0
    fused = [layer for layer in network.decoder.layers if _permits(layer)]
    for layer in fused:
        layer.fused = FusedLayer(layer)
    return len(fused)


def _permits(layer: Any) -> bool:
    """Whether this is a layer with norms before its branches, rotary attention and SwiGLU."""
    mixer, mlp = getattr(layer, layer.mixer_name), getattr(layer, layer.mlp_name)
    return (
        isinstance(mixer, Attention)
        and len(layer.before) == 2
        and layer.is_plain
        and mixer.qk_norm in ("none", "head")
        and isinstance(mixer.result, Identity)
        and not mixer.interleaved
        and mixer.rotary_dim is None
        and not mixer.rope.query_beta
        and isinstance(mlp.activation, SwigluInput)
        and all(mergeable(group) for group in _groups(layer))
    )


def _groups(layer: Any) -> list[list[nn.Module]]:
    """The linears of each product, in their order."""
    mixer, mlp = getattr(layer, layer.mixer_name), getattr(layer, layer.mlp_name)
    mixer_groups = linears_of(mixer, mixer.inputs), linears_of(mixer, [layer.output])
    return [*mixer_groups, linears_of(mlp, mlp.inputs), linears_of(mlp, mlp.outputs)]


class FusedLayer:
    """The passes of one layer, and its merged linears."""

    def __init__(self, layer: Any) -> None:
        mixer = getattr(layer, layer.mixer_name)
        self.layer, self.window, self.cap = layer, mixer.window, mixer.cap
        self.queries, self.keys = (width // mixer.head_dim for width in mixer.widths[:2])
        self.head_dim: int = mixer.head_dim
        self.head_norms = mixer.norms()
        self.norms: list[Any] = [getattr(layer, name) for name in layer.before]
        self.groups = [Merged(linears) for linears in _groups(layer)]
        self.of_x, self.of_mixed, self.of_stream, self.of_gates = self.groups

    def runs(self, x: Tensor, attend: Attend) -> bool:
        """Whether these passes compute the layer now, and not its modules."""
        return (
            gpu_ops.ready(x)
            and isinstance(attend, PackedDocuments)
            and all(group.is_whole() for group in self.groups)
            and all(
                one is other
                for group, linears in zip(self.groups, _groups(self.layer), strict=True)
                for one, other in zip(group.linears, linears, strict=True)
            )
        )

    def __call__(self, x: Tensor, rotary: Rotary, attend: PackedDocuments, rows: Tensor | None) -> Tensor:
        """As the layer's `forward`."""
        self._fill()
        first, second = (self._parameters(groups) for groups in (self.groups[:1], self.groups[1:]))
        heads = x.new_empty(0, self.queries, self.head_dim)  # of such queries
        layout = attend.layout(heads, self.cap)
        q, k, v, x = _Before.apply(self, layout, rotary, x, *first)  # type: ignore[no-untyped-call]
        mixed = attend.attend_laid_out(q, k, v, layout, self.window, self.cap).flatten(1)
        if rows is not None:
            mixed, x = mixed[rows], x[rows]
        out: Tensor = _After.apply(self, mixed, x, *second)  # type: ignore[no-untyped-call]
        return out

    def _parameters(self, groups: list[Merged]) -> list[Tensor]:
        return [
            part for group in groups for linear in group.adapted for part in (linear.lora_A, linear.lora_B)
        ]

    def _fill(self) -> None:
        """Copy the adapter into the merged matrices: in each pass, so that nothing has to know of changes."""
        if pairs := [pair for group in self.groups for pair in group.copies()]:
            gpu_ops.fill([parameter.detach() for parameter, _ in pairs], [place for _, place in pairs])


class _Before(torch.autograd.Function):
    """x -> queries, keys and values of all places, (places, heads, head_dim) each, and x itself."""

    @staticmethod
    def forward(
        ctx: Any, fused: FusedLayer, layout: Layout, rotary: Rotary, x: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        merged, norm = fused.of_x, fused.norms[0]
        room = merged.room(len(x))
        _, rstd = gpu_ops.rms_norm(x, norm.weight, norm.eps, norm.offset, room[:, : merged.ins])
        drop = merged.drop()
        qkv, low = merged.product(room, drop)
        del room
        index = None if layout.places is None else layout.places.index
        heads = fused.queries, fused.keys
        repeats = fused.queries // fused.keys if layout.batches else 1
        apart = gpu_ops.rotate_apart(qkv, rotary, *heads, index, fused.head_norms, repeats)
        ctx.fused, ctx.layout, ctx.drop, ctx.repeats = fused, layout, drop, repeats
        ctx.save_for_backward(x, rstd, low, None if fused.head_norms is None else qkv, *rotary)
        keys = fused.keys * repeats
        parts = apart.unflatten(1, (-1, fused.head_dim)).split((fused.queries, keys, keys), dim=1)
        return (*parts, x.view_as(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        fused: FusedLayer = ctx.fused
        merged, norm, places = fused.of_x, fused.norms[0], ctx.layout.places
        x, rstd, low, qkv, *rotary = ctx.saved_tensors
        room = merged.room_of_gradients(len(x))
        order = None if places is None else (places.in_order, places.begins)
        gradients = [gradient.contiguous() for gradient in grad_outputs[:3]]
        into = room[:, : merged.out]
        arguments = gradients, tuple(rotary), order, into, fused.head_norms, qkv
        gpu_ops.rotate_together(*arguments, repeats=ctx.repeats)
        dy, of_b = merged.gradients(room, low, ctx.drop)
        y = torch.empty_like(x)
        weights = x, norm.weight, rstd, norm.offset
        d_x = gpu_ops.rms_norm_backward(dy, *weights, residual=grad_outputs[3], y=y)
        return None, None, None, d_x, *merged.parameter_gradients(room, y, of_b, ctx.drop)


class _After(torch.autograd.Function):
    """The output of the attention and the residual stream, (tokens, ...) -> the stream after the layer."""

    @staticmethod
    def forward(ctx: Any, fused: FusedLayer, mixed: Tensor, x: Tensor, *parameters: Tensor) -> Tensor:
        norm, drops = fused.norms[1], [group.drop() for group in fused.groups[1:]]
        stream, low_mixed = fused.of_mixed.product_apart(mixed, drops[0], x)
        room = fused.of_stream.room(len(x))
        into = room[:, : fused.of_stream.ins]
        _, rstd = gpu_ops.rms_norm(stream, norm.weight, norm.eps, norm.offset, into)
        gates, low_stream = fused.of_stream.product(room, drops[1])
        del room
        room = fused.of_gates.room(len(x))
        gate, up = gates.chunk(2, dim=1)
        gpu_ops.swiglu(gate, up, room[:, : fused.of_gates.ins])
        out, low_gates = fused.of_gates.product(room, drops[2], stream)
        ctx.fused, ctx.drops = fused, drops
        ctx.save_for_backward(mixed, low_mixed, stream, rstd, low_stream, gates, low_gates)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        fused: FusedLayer = ctx.fused
        of_mixed, of_stream, of_gates = fused.groups[1:]
        mixed, low_mixed, stream, rstd, low_stream, gates, low_gates = ctx.saved_tensors
        tokens, grad_output, norm = len(stream), grad_outputs[0], fused.norms[1]
        room = of_gates.room_of_gradients(tokens)
        room[:, : of_gates.out] = grad_output
        # y is a gradient first, and the input later
        y, of_b = of_gates.gradients(room, low_gates, ctx.drops[2])
        inner = of_stream.room_of_gradients(tokens)
        (gate, up), (d_gate, d_up) = (both.chunk(2, dim=1) for both in (gates, inner[:, : of_stream.out]))
        gpu_ops.swiglu_backward(y, gate, up, d_gate, d_up, y)
        of_down = of_gates.parameter_gradients(room, y, of_b, ctx.drops[2])
        del y, room
        dy, of_b = of_stream.gradients(inner, low_stream, ctx.drops[1])
        y, room = torch.empty_like(stream), of_mixed.room_of_gradients(tokens)
        d_x = room[:, : of_mixed.out]
        weights = stream, norm.weight, rstd, norm.offset
        gpu_ops.rms_norm_backward(dy, *weights, residual=grad_output, into=d_x, y=y)
        of_up = of_stream.parameter_gradients(inner, y, of_b, ctx.drops[1])
        del y, dy, inner
        d_mixed, of_b = of_mixed.gradients(room, low_mixed, ctx.drops[0])
        of_output = of_mixed.parameter_gradients(room, mixed, of_b, ctx.drops[0])
        return None, d_mixed, d_x, *of_output, *of_up, *of_down
