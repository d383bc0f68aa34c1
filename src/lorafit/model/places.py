"""Where the tokens of a pass lie for its attention: documents may share tokens, and may be padded in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorafit.model import gpu_ops

GROUP = 64  # documents whose lengths round up to the same multiple of it form a batch


@dataclass(frozen=True, slots=True)
class Places:
    """Where the tokens of a pass lie in its documents, on the device of the pass, if documents share tokens."""

    first: Tensor  # the first place of each token, int64 (tokens,)
    index: Tensor  # the token of each place, int64 (places,)
    in_order: Tensor  # the places in the order of their tokens, int64 (places,)
    begins: Tensor  # where a token's places begin in them, int64 (tokens,)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tokens of a pass lie for the attention. In batches of documents (documents, length) each, a document is
    padded by its last token, and there are as many heads of keys as of queries.
    """

    places: Places | None  # None if each token has one place
    batches: tuple[tuple[int, int], ...]


def places_of(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The last three of Places, for the token of each place."""
    counts = index.bincount()
    return index, index.argsort(stable=True), counts.cumsum(0) - counts


def placed(tables: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """int64 tensors of the CPU on `device`, in one copy: each copy of pageable memory waits for the device."""
    if device.type == "cpu":
        return list(tables)
    whole = torch.cat([table.flatten() for table in tables]).to(device)
    parts = whole.split([table.numel() for table in tables])
    return [part.view(table.shape) for part, table in zip(parts, tables, strict=True)]


class Apart(torch.autograd.Function):
    """The token of each place. The gradients of a shared token are added in float32 and in the order of its places:
    index_select's own backward pass rounds each sum of 16-bit numbers, and on a GPU its order differs between runs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, in_order: Tensor, begins: Tensor) -> Tensor:
        ctx.save_for_backward(in_order, begins)
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        in_order, begins = ctx.saved_tensors
        total = F.embedding_bag(in_order, grad_outputs[0].flatten(1), begins, mode="sum")
        return total.unflatten(1, grad_outputs[0].shape[1:]), None, None, None


class First(torch.autograd.Function):
    """What each token's first place has, of (places, ...)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, first: Tensor) -> Tensor:
        ctx.save_for_backward(index, first)
        return x.index_select(0, first)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        rows = gpu_ops.spread(grad_outputs[0].flatten(1).contiguous(), *ctx.saved_tensors)
        return rows.unflatten(1, grad_outputs[0].shape[1:]), None, None


def group_rows(starts: Tensor) -> tuple[list[Tensor], Tensor]:
    """Groups of documents by rounded length: the tokens of each, int64 (documents, length). Padding repeats a
    document's last token. And the index of each token in the concatenated groups, int64 (tokens,).
    """
    lengths = starts.diff()
    rounded = (lengths + GROUP - 1) // GROUP * GROUP
    groups, before, index_of = [], 0, torch.empty(int(starts[-1]), dtype=torch.int64)
    for length in rounded.unique().tolist():
        documents = (rounded == length).nonzero()
        offsets = torch.arange(length).expand(len(documents), length)
        rows = starts[documents] + offsets.minimum(lengths[documents] - 1)
        inside = offsets < lengths[documents]
        index_of[rows[inside]] = before + torch.arange(rows.numel()).view_as(rows)[inside]
        before += rows.numel()
        groups.append(rows)
    return groups, index_of


def groups_on(starts: Tensor, device: torch.device) -> list[Tensor]:
    """Those of `group_rows` on a device, the index at the end of the list."""
    groups, index_of = group_rows(starts)
    return placed([*groups, index_of], device)
