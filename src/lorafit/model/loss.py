"""Cross-entropy of the supervised tokens only, in chunks: no (tokens x vocabulary) table ever exists."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK_ELEMENTS = 8 * 2**20  # logits alive at a time: 32 MB in float32


def loss_sum(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Sum over rows of the cross-entropy of `targets`, a float32 (or float64) scalar.

    hidden (rows, hidden_size) is after the final norm, head (vocab_size, hidden_size) is frozen, targets int64
    (rows,). The caller divides once, by the trained tokens of the whole optimizer step.
    """
    total: Tensor = _ChunkedCrossEntropy.apply(hidden, head, targets)  # type: ignore[no-untyped-call]
    return total


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Forms the gradient of `hidden` chunk by chunk in the forward pass, where the logits are at hand anyway."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        rows = max(1, _CHUNK_ELEMENTS // head.shape[0])
        for start in range(0, hidden.shape[0], rows):
            chunk = slice(start, start + rows)
            index = targets[chunk, None]
            logits = (hidden[chunk] @ head.T).to(wide)  # (rows, vocab_size)
            log_total = logits.logsumexp(-1, keepdim=True)
            total += (log_total - logits.gather(-1, index)).sum()
            if gradient is not None:
                slope = logits.sub_(log_total).exp_()
                slope.scatter_add_(-1, index, slope.new_full((), -1).expand_as(index))
                gradient[chunk] = slope.to(hidden.dtype) @ head
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        # the incoming scale stays in the wide type until the last product: float16 would flush small ones
        return (gradients[0] * gradient).to(gradient.dtype), None, None
