"""Cross-entropy of the supervised tokens only, in chunks: there is never a (tokens x vocabulary) table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorafit.model.linear import matmul
from lorafit.model.ops import cross_entropy, wide

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
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None = None, cap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`loss_sum`, and its parts (rows,). The gradient of either is exact, also of any function of the parts."""
    total, parts = _ChunkedCrossEntropy.apply(hidden, head, targets, weights, cap)  # type: ignore[no-untyped-call]
    return total, parts


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradient of `hidden` per chunk in the forward pass, which has the logits.

    The loss of a row depends on that row of `hidden` alone, so a gradient of the parts is a factor per row.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None, cap: float
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        total = torch.zeros((), dtype=wide(hidden.dtype), device=hidden.device)
        parts = torch.empty(hidden.shape[0], dtype=total.dtype, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        most_bytes, bytes_per_logit = chunk_bytes(head.element_size(), head.is_cuda)
        most = max(1, most_bytes // (head.shape[0] * bytes_per_logit))
        chunks = -(-hidden.shape[0] // most)
        for number in range(chunks):  # of nearly equal length: a short one would be slow
            chunk = slice(number * hidden.shape[0] // chunks, (number + 1) * hidden.shape[0] // chunks)
            logits = matmul(hidden[chunk], head)  # (rows, vocab_size); overwritten by its gradient
            slope = None
            if cap:
                ratio = logits.div_(cap).tanh_()
                slope = 1 - ratio.to(wide(ratio.dtype)).square() if gradient is not None else None
                logits.mul_(cap)
            losses = cross_entropy(logits, targets[chunk], grad_output=gradient is not None)
            if weights is not None:
                losses = losses * weights[chunk]
                logits.mul_(weights[chunk, None])
            if slope is not None:
                logits.mul_(slope)
            total += losses.sum()
            parts[chunk] = losses
            if gradient is not None:
                gradient[chunk] = matmul(logits, head, transposed=True)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total, parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        # a scalar tensor takes the type of the tensor that it multiplies: widen first, or the scale itself is rounded
        of_total, of_parts = gradients
        scale = of_total if of_parts is None else of_parts[:, None]
        if of_total is not None and of_parts is not None:
            scale = scale + of_total
        return (scale * gradient.to(scale.dtype)).to(gradient.dtype), None, None, None, None
