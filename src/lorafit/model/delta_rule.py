"""The gated delta rule of packed documents (Yang et al., 2024): linear attention whose state ends with its document.

A head has a state S (key_dim, value_dim), zero at the start of a document. A token decays it by exp(g), corrects what
it says for the key k towards the value v, and reads it with the query q:

    S = exp(g) S;  S = S + k (beta (v - S^T k))^T;  o = S^T q

Keys and queries have the length 1, queries are divided by the root of key_dim. Documents are computed one by one in
chunks that begin with the document, so that each has the bits that it has alone. The backward pass keeps the inputs
only. Numbers are float32, or float64 for float64. On the CPU a compiled kernel computes it
(model/native/delta_rule.cpp), on CUDA in 16 bits the package flash-linear-attention where it is installed, else torch.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorafit.model.definitions import wide
from lorafit.model.mixer_shapes import DeltaHeads
from lorafit.model.native import fits, kernels

Rule = Callable[..., tuple[Tensor, Tensor]]
CHUNK = 64
_EPS = 1e-6


def delta_rule(
    qkv: Tensor, g: Tensor, beta: Tensor, heads: DeltaHeads, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """(outputs (tokens, value heads * value_dim), the state at the end of each document).

    qkv (tokens, heads.channels) has queries, keys and values side by side; g and beta (tokens, value heads) are the
    logarithm of the decay and the step. States are (documents, value heads, key_dim, value_dim), without gradients.
    """
    if qkv.is_cuda and qkv.dtype.itemsize == 2 and (rule := installed_rule()) is not None:
        return by_package(rule, qkv, g, beta, heads, lengths)
    inputs = qkv.contiguous(), g.to(wide(g.dtype)).contiguous(), beta.to(qkv.dtype).contiguous()
    out, states = _DeltaRule.apply(*inputs, heads, tuple(lengths))  # type: ignore[no-untyped-call]
    return out, states


@functools.cache
def installed_rule() -> Rule | None:
    """`chunk_gated_delta_rule` of flash-linear-attention (extra `fla`); None without the package."""
    try:
        rule: Rule = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    except ImportError:
        return None
    return rule


def by_package(
    rule: Rule, qkv: Tensor, g: Tensor, beta: Tensor, heads: DeltaHeads, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """`delta_rule` by the package's function: it norms queries and keys, and reads documents by their borders."""
    q, k, v = _parts(qkv, heads)
    q, k = (part.repeat_interleave(heads.values // heads.keys, 1) for part in (q, k))
    borders = torch.tensor([0, *lengths], device=qkv.device).cumsum(0)
    tensors = (x[None] for x in (q, k, v, g.to(wide(g.dtype)), beta.to(qkv.dtype)))  # one row of a batch
    out, states = rule(*tensors, output_final_state=True, cu_seqlens=borders, use_qk_l2norm_in_kernel=True)
    return out[0].flatten(1), states.detach()


def delta_step(qkv: Tensor, g: Tensor, beta: Tensor, heads: DeltaHeads, states: Tensor) -> Tensor:
    """The output of one token per row, (rows, value heads * value_dim); `states` (rows, ...) are brought forward."""
    q, k, v = (
        part.transpose(0, 1) for part in split_heads(qkv, heads, states.dtype)
    )  # (rows, heads, numbers)
    states *= g.to(states.dtype).exp()[..., None, None]
    said = (states * k[..., None]).sum(-2)
    states += k[..., None] * (beta.to(states.dtype)[..., None] * (v - said))[..., None, :]
    return (states * q[..., None]).sum(-2).flatten(1).to(qkv.dtype)


def split_heads(qkv: Tensor, heads: DeltaHeads, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Normed queries and keys and the values, (value heads, tokens, numbers): some heads share a key."""
    q, k, v = (part.to(dtype).transpose(0, 1) for part in _parts(qkv, heads))
    q, k = (part * torch.rsqrt(part.square().sum(-1, keepdim=True) + _EPS) for part in (q, k))
    shared = heads.values // heads.keys
    if shared > 1:
        q, k = (part.repeat_interleave(shared, 0) for part in (q, k))
    return q * heads.key_dim**-0.5, k, v


def _parts(qkv: Tensor, heads: DeltaHeads) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (tokens, heads, numbers)."""
    widths = heads.keys * heads.key_dim, heads.keys * heads.key_dim, heads.values * heads.value_dim
    q, k, v = qkv.split(widths, -1)
    q, k = (part.unflatten(-1, (heads.keys, heads.key_dim)) for part in (q, k))
    return q, k, v.unflatten(-1, (heads.values, heads.value_dim))


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, g: Tensor, beta: Tensor, heads: DeltaHeads, lengths: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(qkv, g, beta)
        ctx.heads, ctx.lengths = heads, lengths
        if fits(qkv):
            out = qkv.new_empty(len(qkv), heads.values * heads.value_dim)
            states = g.new_empty(len(lengths), heads.values, heads.key_dim, heads.value_dim)
            _call("delta_rule", lengths, heads, qkv, g, beta, out, states)
            ctx.mark_non_differentiable(states)
            return out, states
        documents = zip(qkv.split(lengths), g.split(lengths), beta.split(lengths), strict=True)
        outs, ends = zip(*(_document(q, d, b, heads) for q, d, b in documents), strict=True)
        ctx.mark_non_differentiable(states := torch.stack(ends))
        return torch.cat(outs), states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: with recomputation they are computed again at the first access only
        if fits(saved[0]):
            into = [torch.empty_like(x) for x in saved]
            _call(
                "delta_rule_backward",
                ctx.lengths,
                ctx.heads,
                *saved,
                grad_outputs[0].contiguous(),
                *into,
            )
            return (*into, None, None)
        gradients = []
        for *document, slope in zip(*(x.split(ctx.lengths) for x in (*saved, grad_outputs[0])), strict=True):
            qkv, g, beta = (x.detach().requires_grad_() for x in document)
            with torch.enable_grad():
                out, _ = _document(qkv, g, beta, ctx.heads)
            gradients.append(torch.autograd.grad(out, (qkv, g, beta), slope))
        return (*map(torch.cat, zip(*gradients, strict=True)), None, None)


def _call(name: str, lengths: Sequence[int], heads: DeltaHeads, qkv: Tensor, *tensors: Tensor) -> None:
    compiled = kernels()
    assert compiled is not None
    starts = torch.tensor([0, *lengths]).cumsum(0)
    shape = len(lengths), starts, heads.keys, heads.values, heads.key_dim, heads.value_dim
    compiled.call(name, qkv.dtype, *shape, qkv, *tensors)


def _document(qkv: Tensor, g: Tensor, beta: Tensor, heads: DeltaHeads) -> tuple[Tensor, Tensor]:
    """(outputs (length, value heads * value_dim), last state) of one document."""
    dtype = wide(qkv.dtype)
    q, k, v = split_heads(qkv, heads, dtype)
    g, beta = (x.to(dtype).t()[..., None] for x in (g, beta))  # (heads, length, 1)
    length = len(qkv)
    size = min(CHUNK, length)
    filler = -length % size
    q, k, v, g, beta = (F.pad(x, (0, 0, 0, filler)).unflatten(1, (-1, size)) for x in (q, k, v, g, beta))
    total = g.cumsum(-2)  # (heads, chunks, size, 1): the logarithm of the decay since the chunk began
    seen = torch.ones(size, size, dtype=torch.bool, device=qkv.device).tril()
    decay = (total - total.transpose(-1, -2)).masked_fill(~seen, -torch.inf).exp()
    # corrections within a chunk: a triangular system for all its tokens
    system = (beta * k) @ k.transpose(-1, -2) * decay
    wanted = torch.cat([beta * v, beta * k * total.exp()], -1)
    solved = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    values, of_state = solved.split((heads.value_dim, heads.key_dim), -1)
    scores = q @ k.transpose(-1, -2) * decay
    q_decayed, end = q * total.exp(), total[..., -1:, :]
    k_decayed = (k * (end - total).exp()).transpose(-1, -2)
    state = torch.zeros(heads.values, heads.key_dim, heads.value_dim, dtype=dtype, device=qkv.device)
    outs = []
    for chunk in range(q.shape[1]):
        corrections = values[:, chunk] - of_state[:, chunk] @ state
        outs.append(q_decayed[:, chunk] @ state + scores[:, chunk] @ corrections)
        state = end[:, chunk].exp() * state + k_decayed[:, chunk] @ corrections
    out = torch.cat(outs, 1)[:, :length]
    return out.transpose(0, 1).flatten(1).to(qkv.dtype), state
