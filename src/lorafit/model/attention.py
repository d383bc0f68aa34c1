"""Causal attention over packed documents: tokens attend within their own document, without a dense mask."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorafit.model import definitions, gpu_ops
from lorafit.model.convolution import convolution
from lorafit.model.delta_rule import delta_rule
from lorafit.model.gpu_ops import HeadNorms
from lorafit.model.mixer_shapes import DeltaHeads
from lorafit.model.native import fits, kernels
from lorafit.model.ops import norm, rms_norm, rms_norm_backward
from lorafit.model.places import Apart, First, Layout, Places, group_rows, groups_on, placed, places_of

# How documents attend: in the CPU's compiled kernel, all in one call of flash attention, in batches of documents of
# similar length, or one after another.
Way = Literal["kernel", "flash", "batches", "documents"]


class Attend(Protocol):
    """How a pass attends: packed documents in training, a key-value cache in generation."""

    positions: Tensor
    """Position of each token in its own document, int64 (tokens,)."""

    def lengths_seen(self) -> Tensor:
        """The tokens of each token's document up to the end of this pass, int64 (tokens,)."""
        ...

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: Rotary,
        window: int | None,
        cap: float = 0.0,
        norms: HeadNorms | None = None,
    ) -> Tensor:
        """q (tokens, heads, head_dim), k and v (tokens, kv_heads, head_dim) -> (tokens, heads, head_dim).

        q and k are not rotated yet, and not normed if there are `norms`: `rotary` holds the angles. A score s becomes
        cap * tanh(s / cap), if `cap` is set.
        """
        ...

    def convolve(self, layer: int, x: Tensor, weight: Tensor) -> Tensor:
        """The causal depthwise convolution of x (tokens, channels) with `weight` (channels, 1, width)."""
        ...

    def delta(self, layer: int, qkv: Tensor, g: Tensor, beta: Tensor, heads: DeltaHeads) -> Tensor:
        """The gated delta rule, as `delta_rule` in model/delta_rule.py."""
        ...


Rotary = tuple[Tensor, Tensor]  # cosine and sine of each token's angles, float32 (tokens, head_dim / 2)


class PackedDocuments:
    """Consecutive documents in one pass.

    `lengths` are their token counts. Documents with a common prefix may share tokens: then `index` int64 (sum of
    lengths,) are their tokens in the pass, numbered in the order in which they first occur. A document's result has
    the same bits whatever its neighbours are, because no product mixes two documents.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        index: Tensor | None = None,
        also: Sequence[Tensor] = (),
    ) -> None:
        """`also` are further int64 tensors of the pass, which go to the device in the same copy: `self.also` there."""
        self.lengths = list(lengths)
        positions = torch.cat([torch.arange(length) for length in self.lengths])
        self.index = torch.arange(len(positions)) if index is None else index
        first = self.index.cummax(0).values.diff(prepend=torch.tensor([-1])).nonzero()[:, 0]
        self._first = first
        self.starts = torch.tensor([0, *self.lengths]).cumsum(0)  # int64 (documents + 1,)
        shares_tokens = len(first) < len(positions)
        places = (first, *places_of(self.index)) if shares_tokens else ()
        tables = placed([positions[first], self.starts, *places, *also], torch.device(device))
        self.positions, starts, *tables = tables
        self._starts_there = starts.to(torch.int32)  # the type that flash attention needs
        self.shared = Places(*tables[: len(places)]) if shares_tokens else None
        self.also = tables[len(places) :]
        self._groups: list[Tensor] | None = None
        self._padded: Layout | None = None
        self._places: Tensor | None = None

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: Rotary,
        window: int | None,
        cap: float = 0.0,
        norms: HeadNorms | None = None,
    ) -> Tensor:
        if q.shape[-1] % 16 == 0 and fits(q, k, v):
            documents = self.starts, self.index
            out: Tensor = _Attention.apply(q, k, v, *rotary, *documents, window or 0, cap, norms)  # type: ignore[no-untyped-call]
            return out
        q, k = normed(q, k, norms)
        q, k = rotate(q, rotary), rotate(k, rotary)
        apart = self.apart(q), self.apart(k), self.apart(v)
        out = self._capped(*apart, window, cap) if cap else self._attend(*apart, window)
        return out if self.shared is None else out.index_select(0, self.shared.first)

    def layout(self, q: Tensor, cap: float) -> Layout:
        """Where the tokens lie for the attention of such queries (tokens, heads, head_dim) on a GPU."""
        if cap or has_flash(q):
            return Layout(self.shared, ())
        if self._padded is None:
            rows, index_of = group_rows(self.starts)
            index = self.index[torch.cat([group.flatten() for group in rows])]
            tables = placed([index_of[self._first], *places_of(index)], q.device)
            self._padded = Layout(Places(*tables), tuple((len(group), group.shape[1]) for group in rows))
        return self._padded

    def attend_laid_out(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None, cap: float
    ) -> Tensor:
        """The same of rotated tokens that lie as in `layout`; the gradients by model/gpu_ops.py."""
        if cap:
            out = self._capped(q, k, v, window, cap)
        elif layout.batches:
            sizes = [documents * length for documents, length in layout.batches]
            groups = zip(layout.batches, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
            outs = []
            for shape, q_group, k_group, v_group in groups:
                batch = [x.unflatten(0, shape) for x in (q_group, k_group, v_group)]
                outs.append(_dot_product_attention(batch[0], batch[1], batch[2], window).flatten(0, 1))
            out = torch.cat(outs)
        else:
            out = self._attend(q, k, v, window)
        if layout.places is None:
            return out
        first: Tensor = First.apply(out, layout.places.index, layout.places.first)  # type: ignore[no-untyped-call]
        return first

    def convolve(self, layer: int, x: Tensor, weight: Tensor) -> Tensor:
        if self._places is None:  # positions of each token of each document
            self._places = self.apart(self.positions)
        out = convolution(self.apart(x), weight, self._places)
        return out if self.shared is None else out.index_select(0, self.shared.first)

    def delta(self, layer: int, qkv: Tensor, g: Tensor, beta: Tensor, heads: DeltaHeads) -> Tensor:
        out, _ = self.delta_and_states(qkv, g, beta, heads)
        return out

    def delta_and_states(
        self, qkv: Tensor, g: Tensor, beta: Tensor, heads: DeltaHeads
    ) -> tuple[Tensor, Tensor]:
        """The outputs of the rule, and the state at the end of each document."""
        out, states = delta_rule(self.apart(qkv), self.apart(g), self.apart(beta), heads, self.lengths)
        return (out if self.shared is None else out.index_select(0, self.shared.first)), states

    def lengths_seen(self) -> Tensor:
        lengths = torch.tensor(self.lengths)
        return lengths.repeat_interleave(lengths)[self._first].to(self.positions.device)

    def apart(self, x: Tensor) -> Tensor:
        """x (tokens of the pass, ...) for every token of every document: shared tokens are repeated."""
        if self.shared is None:
            return x
        shared = self.shared
        apart: Tensor = Apart.apply(x, shared.index, shared.in_order, shared.begins)  # type: ignore[no-untyped-call]
        return apart

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Attention of rotated tokens that no documents share."""
        if has_flash(q):
            return self._flash(q, k, v, window)
        if q.is_cuda:
            return self._batched(q, k, v, window)
        documents = self._documents(q, k, v)
        return torch.cat([causal_attention(q_doc, k_doc, v_doc, window) for q_doc, k_doc, v_doc in documents])

    def _capped(self, q: Tensor, k: Tensor, v: Tensor, window: int | None, cap: float) -> Tensor:
        """The same with a cap of scores, which torch's attentions do not have."""
        outs = []
        for document in self._documents(q, k, v):
            length = len(document[0])
            mask = window_mask(length, window or length, q.device)
            q_doc, k_doc, v_doc = (x.transpose(0, 1) for x in document)  # (heads, length, head_dim)
            outs.append(capped_attention(q_doc, k_doc, v_doc, mask, cap).transpose(0, 1))
        return torch.cat(outs)

    def _documents(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The tokens of each document."""
        return zip(*(x.split(self.lengths) for x in tensors), strict=True)

    def _flash(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """All documents in one call of torch's variable-length flash attention (Dao, 2023)."""
        out: Tensor = _Flash.apply(q, k, v, self._starts_there, max(self.lengths), window)  # type: ignore[no-untyped-call]
        return out

    def _batched(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """One call per group of documents of similar length, padded at their ends: no token attends to padding."""
        if self._groups is None:
            self._groups = groups_on(self.starts, q.device)
        outs = []
        if k.shape[1] != q.shape[1]:  # torch's memory-efficient attention takes equal numbers of heads only
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        for rows in self._groups[:-1]:  # (documents, length)
            outs.append(_dot_product_attention(q[rows], k[rows], v[rows], window).flatten(0, 1))
        return torch.cat(outs)[self._groups[-1]]


def has_flash(q: Tensor) -> bool:
    """Whether torch's flash attention supports such queries."""
    return q.is_cuda and way_on_device(q.device, q.dtype, q.shape[-1]) == "flash"


def way_on_device(device: torch.device, dtype: torch.dtype, head_dim: int) -> Way:
    """How documents attend without the CPU's kernel: flash needs a 16-bit type on an Ampere chip or a later one."""
    if device.type != "cuda":
        return "documents"
    fits_flash = dtype in (torch.float16, torch.bfloat16) and head_dim % 8 == 0 and head_dim <= 256
    is_ours = torch.version.cuda is not None
    if fits_flash and is_ours and torch.cuda.get_device_capability(device) >= (8, 0):
        return "flash"
    return "batches"


class _Flash(torch.autograd.Function):
    """Causal flash attention of consecutive documents, by the operators that torch 2.11 to 2.13 have in common.

    `starts` int32 (documents + 1,). k and v may have fewer heads than q.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, window: int | None
    ) -> Tensor:
        ctx.documents = (longest, longest, 0.0, False)  # 0 is the dropout; the window makes it causal
        # keys before and after the query; -1 is all
        ctx.window = {"window_size_left": -1 if window is None else window - 1, "window_size_right": 0}
        out, lse, random, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, starts, starts, *ctx.documents, False, **ctx.window
        )
        ctx.save_for_backward(q, k, v, out, lse, starts, random, unused)
        return out  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, starts, random, unused = ctx.saved_tensors
        gradients = torch.ops.aten._flash_attention_backward(
            grad_outputs[0].contiguous(),
            *tensors,
            starts,
            starts,
            *ctx.documents,
            random,
            unused,
            **ctx.window,
        )
        return (*gradients, None, None, None)


class _Attention(torch.autograd.Function):
    """Norms, rotation and attention of all documents (model/native/attention.cpp).

    Queries and keys are kept as they come, and normed again in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cosine: Tensor,
        sine: Tensor,
        starts: Tensor,
        index: Tensor,
        window: int,
        cap: float,
        norms: HeadNorms | None,
    ) -> Tensor:
        q_normed, k_normed = normed(q, k, norms)
        out, lse = attend_kernel(starts, index, 0, window, cap, q_normed, k_normed, v, cosine, sine)
        ctx.save_for_backward(q, k, v, lse, cosine, sine, starts, index)
        ctx.window, ctx.cap, ctx.norms = window, cap, norms
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, lse, cosine, sine, starts, index = ctx.saved_tensors
        norms, given = ctx.norms, (q, k)
        if norms is not None:
            (q, q_rstd), (k, k_rstd) = _normed_rows(q, k, norms)
        into = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        grad_output = grad_outputs[0].contiguous()
        tensors = q, k, v, grad_output, lse, cosine, sine, *into
        shape = q.shape[1], k.shape[1], q.shape[2], ctx.window, ctx.cap
        compiled = kernels()
        assert compiled is not None
        compiled.call("attend_backward", q.dtype, len(starts) - 1, starts, index, *shape, *tensors)
        if norms is None:
            return (*into, *[None] * 7)
        of_given = []
        for grad, x, weight, rstd in zip(into[:2], given, norms.weights, (q_rstd, k_rstd), strict=True):
            rows = _as_rows(grad, weight), _as_rows(x, weight)
            of_given.append(rms_norm_backward(*rows, weight, rstd, norms.offset).view_as(x))
        return (*of_given, into[2], *[None] * 7)


def normed(q: Tensor, k: Tensor, norms: HeadNorms | None) -> tuple[Tensor, Tensor]:
    """Queries and keys (tokens, heads, head_dim) after their norms, differentiable."""
    if norms is None:
        return q, k
    q_norm, k_norm = norms.weights
    q, k = q.contiguous(), k.contiguous()
    return (
        norm(_as_rows(q, q_norm), q_norm, norms.eps, norms.offset).view_as(q),
        norm(_as_rows(k, k_norm), k_norm, norms.eps, norms.offset).view_as(k),
    )


def _normed_rows(q: Tensor, k: Tensor, norms: HeadNorms) -> list[tuple[Tensor, Tensor]]:
    """Of queries and of keys: (normed, in the same shape, 1 / rms of each row); not differentiable."""
    found = []
    for x, weight in zip((q, k), norms.weights, strict=True):
        y, rstd = rms_norm(_as_rows(x, weight), weight, norms.eps, norms.offset)
        found.append((y.view_as(x), rstd))
    return found


def _as_rows(x: Tensor, weight: Tensor) -> Tensor:
    """x as rows of as many numbers as the weight of its norm has."""
    return x.reshape(-1, len(weight))


def attend_kernel(
    starts: Tensor,
    index: Tensor,
    known: int,
    window: int,
    cap: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cosine: Tensor,
    sine: Tensor,
) -> tuple[Tensor, Tensor]:
    """The attention of model/native/attention.cpp, and the logarithms of its sums (tokens, heads).

    The first `known` tokens are keys and values only: their rows of the results have any content.
    """
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    shape = q.shape[1], k.shape[1], q.shape[2], window, cap
    compiled = kernels()
    assert compiled is not None
    tensors = q, k, v, cosine, sine, out, lse
    compiled.call("attend", q.dtype, len(starts) - 1, starts, index, known, *shape, *tensors)
    return out, lse


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Apply rotary positions to x (tokens, heads, head_dim); pairs are the halves of a head (Su et al., 2021)."""
    out: Tensor = _Rotate.apply(x, *rotary)  # type: ignore[no-untyped-call]
    return out


class _Rotate(torch.autograd.Function):
    """Its gradient is the rotation by the opposite angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _rotated(x, (cosine, sine))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _rotated(grad_outputs[0], (cosine, -sine)), None, None


def _rotated(x: Tensor, rotary: Rotary) -> Tensor:
    if gpu_ops.ready(x):
        return gpu_ops.rotate_apart(x.flatten(1).contiguous(), rotary, x.shape[1], 0, None).view(x.shape)
    return definitions.rotated(x, rotary)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Attention of one document: (length, heads, head_dim) each; k and v have fewer heads if grouped."""
    return _dot_product_attention(q[None], k[None], v[None], window)[0]


def _dot_product_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Causal attention of documents of one length: (documents, length, heads, head_dim) each."""
    length = q.shape[1]
    mask = window_mask(length, window, q.device) if window is not None and window < length else None
    return F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)


def capped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, cap: float) -> Tensor:
    """Attention with scores of cap * tanh(score / cap): q (..., heads, queries, head_dim), k and v with fewer heads if
    grouped; bool `mask` (..., queries, keys) says which keys a query attends to.
    """
    groups = q.shape[-3] // k.shape[-3]
    k, v = (x.repeat_interleave(groups, dim=-3) for x in (k, v))
    scores = (q @ k.transpose(-2, -1)).to(torch.promote_types(q.dtype, torch.float32)) / math.sqrt(
        q.shape[-1]
    )
    scores = (cap * torch.tanh(scores / cap)).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v


def window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """The keys that each query attends to: itself and the `window - 1` before it; bool (length, length)."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)
