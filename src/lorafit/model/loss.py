"""Cross-entropy of the supervised tokens only, in chunks: there is never a (tokens x vocabulary) table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorafit.model.definitions import wide
from lorafit.model.linear import matmul
from lorafit.model.ops import cross_entropy

CHUNK_BYTES = 96 * 2**20  # of logits alive at a time, about as much as a layer's backward pass
GPU_CHUNK_BYTES = 256 * 2**20  # a GPU needs more rows to be busy


def chunk_bytes(width: int, on_gpu: bool) -> tuple[int, int]:
    """(Bytes for logits that are alive at a time, bytes of one of them with its copy in the wide type).

    `width` is bytes per number. The CPU's kernel makes no copy.
    """
    if not on_gpu:
        return CHUNK_BYTES, width
    return GPU_CHUNK_BYTES, width + 4 if width < 4 else width


def loss_sum(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None = None, cap: float = 0.0
) -> Tensor:
    """Sum over rows of the cross-entropy of `targets`, times `weights` (rows,) if given, a float32 (or float64) scalar.

    hidden (rows, hidden_size) is after the final norm, head (vocab_size, hidden_size) is frozen, targets int64
    (rows,). A logit z is cap * tanh(z / cap), if `cap` is set. The caller divides once, by the weights of all trained
    tokens of the optimizer step.
    """
    return loss_sum_and_parts(hidden, head, targets, weights, cap)[0]


def loss_sum_and_parts(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    cap: float = 0.0,
    trained: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """`loss_sum`, and its parts (rows,). The gradient of either is exact, also of any function of the parts.

    `trained` are rows of `head` with a gradient, (tokens, hidden_size), and their ids int64 (tokens,), None for all.
    """
    rows, ids = trained or (None, None)
    total, parts = _ChunkedCrossEntropy.apply(hidden, head, targets, weights, cap, rows, ids)  # type: ignore[no-untyped-call]
    return total, parts


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradient of `hidden` per chunk in the forward pass, which has the logits.

    The loss of a row depends on that row of `hidden` alone, so a gradient of the parts is a factor per row.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        cap: float,
        rows: Tensor | None,
        ids: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        total = torch.zeros((), dtype=wide(hidden.dtype), device=hidden.device)
        parts = torch.empty(hidden.shape[0], dtype=total.dtype, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        columns = []  # the gradients of the logits of trained tokens
        for chunk, losses, slopes in _chunks(
            hidden, head, targets, weights, cap, has_gradient=gradient is not None
        ):
            total += losses.sum()
            parts[chunk] = losses
            if gradient is not None:
                gradient[chunk] = matmul(slopes, head, transposed=True)
            if ctx.needs_input_grad[5] and ids is not None:
                columns.append(slopes[:, ids])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        if ctx.needs_input_grad[5]:
            assert rows is not None
            ctx.trained = (rows.dtype, torch.cat(columns) if columns else None)
            ctx.inputs = (hidden.detach(), head.detach(), targets, weights, cap)
        return total, parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        # a scalar tensor takes the type of the tensor that it multiplies: widen first, or the scale itself is rounded
        of_total, of_parts = gradients
        scale = of_total if of_parts is None else of_parts[:, None]
        if of_total is not None and of_parts is not None:
            scale = scale + of_total
        of_hidden = (scale * gradient.to(scale.dtype)).to(gradient.dtype)
        of_rows = _of_head(ctx.inputs, scale, *ctx.trained) if ctx.needs_input_grad[5] else None
        return of_hidden, None, None, None, None, of_rows, None


def _of_head(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, float],
    scale: Tensor,
    dtype: torch.dtype,
    columns: Tensor | None,
) -> Tensor:
    """The gradient of trained rows of the head; of a whole head the logits are computed again."""
    hidden, head, *_ = inputs
    if columns is not None:
        return (scale * columns.to(scale.dtype)).to(dtype).t() @ hidden.to(dtype)
    total = torch.zeros(head.shape, dtype=dtype, device=head.device)
    for chunk, _, slopes in _chunks(*inputs, has_gradient=True):
        own = scale[chunk] if scale.ndim else scale
        total.addmm_((own * slopes.to(scale.dtype)).to(dtype).t(), hidden[chunk].to(dtype))
    return total


def _chunks(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None, cap: float, *, has_gradient: bool
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For some rows at a time: their losses, and the gradients of their logits (rows, vocab_size)."""
    most_bytes, bytes_per_logit = chunk_bytes(head.element_size(), head.is_cuda)
    most = max(1, most_bytes // (head.shape[0] * bytes_per_logit))
    chunks = -(-hidden.shape[0] // most)
    for number in range(chunks):  # of nearly equal length: a short one would be slow
        chunk = slice(number * hidden.shape[0] // chunks, (number + 1) * hidden.shape[0] // chunks)
        logits = matmul(hidden[chunk], head)  # (rows, vocab_size); overwritten by its gradient
        slope = None
        if cap:
            ratio = logits.div_(cap).tanh_()
            slope = 1 - ratio.to(wide(ratio.dtype)).square() if has_gradient else None
            logits.mul_(cap)
        weight = None if weights is None else weights[chunk]
        losses = cross_entropy(logits, targets[chunk], has_gradient, weight)
        if slope is not None:
            logits.mul_(slope)
        yield chunk, losses, logits
