"""Causal attention over packed documents: each sees itself only, exactly, and no dense mask is ever built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Attend(Protocol):
    """How a pass attends: packed documents while training, a key-value cache while generating."""

    positions: Tensor
    """Position of each token in its own document, int64 (tokens,)."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """q (tokens, heads, head_dim), k and v (tokens, kv_heads, head_dim) -> (tokens, heads, head_dim)."""
        ...


class PackedDocuments:
    """Documents laid end to end in one pass.

    `lengths` are their token counts; they sum to the tokens of the pass. A document's result has the same bits
    whatever its neighbours hold, because no product ever mixes two documents.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.lengths = list(lengths)
        self.positions = torch.cat([torch.arange(length) for length in self.lengths]).to(device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        parts = [
            causal_attention(q_doc, k_doc, v_doc, window)
            for q_doc, k_doc, v_doc in zip(
                q.split(self.lengths), k.split(self.lengths), v.split(self.lengths), strict=True
            )
        ]
        return torch.cat(parts)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Attention of one document: (length, heads, head_dim) each, k and v with fewer heads where grouped."""
    length = q.shape[0]
    mask = window_mask(length, window, q.device) if window is not None and window < length else None
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


def window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """Which keys a query sees: itself and the `window - 1` before it; bool (length, length)."""
    at = torch.arange(length, device=device)
    behind = at[:, None] - at[None, :]
    return (behind >= 0) & (behind < window)
