"""Trained rows of the two tables of tokens, embedding and head: those of chosen tokens, or all.

The table in the network holds the trained rows, so everything that reads it needs no case of its own. The float32
masters are parameters beside it, and a pass copies them into the table when they have changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorafit.model.llama import Llama

EMBEDDING, HEAD = "embed_tokens", "lm_head"
TOKENS = "token_adapter.trainable_tokens_delta"  # PEFT's name of the rows of tokens


class TableRows(nn.Module):
    """Trained rows of a table (tokens, hidden_size): those of `ids` int64 (rows,), or all where that is None.

    `rows` are the masters, `base` the rows of the untrained table.
    """

    ids: Tensor | None
    base: Tensor

    def __init__(self, table: Tensor, ids: Tensor | None, start: Tensor) -> None:
        super().__init__()
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("base", (table if ids is None else table[ids]).clone(), persistent=False)
        self.rows = nn.Parameter(start.to(torch.promote_types(table.dtype, torch.float32)))
        self.enabled = True
        self._shown: tuple[object, ...] = ()

    @torch.no_grad()
    def show(self, table: Tensor) -> None:
        """Let `table` hold the trained rows, or those of the base where the adapter is disabled."""
        state = (self.enabled, self.rows._version, self.rows.data_ptr(), table.data_ptr())
        if state != self._shown:
            rows = (self.rows if self.enabled else self.base).to(table.dtype)
            if self.ids is None:
                table.copy_(rows)
            else:
                table.index_copy_(0, self.ids, rows)
            self._shown = state

    def embed(self, tokens: Tensor, table: Tensor) -> Tensor:
        """The rows of `tokens` int64 (tokens,), with a gradient for the trained ones."""
        if not self.enabled:
            return F.embedding(tokens, table)
        embedded: Tensor = _Embed.apply(self.rows, self.ids, tokens, table)  # type: ignore[no-untyped-call]
        return embedded


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, ids: Tensor | None, tokens: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, ids)
        ctx.shape, ctx.dtype = rows.shape, rows.dtype
        return F.embedding(tokens, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        tokens, ids = ctx.saved_tensors
        gradient = gradients[0].to(ctx.dtype)
        if ids is not None:
            return (ids[:, None] == tokens).to(ctx.dtype) @ gradient, None, None, None
        return gradient.new_zeros(ctx.shape).index_add_(0, tokens, gradient), None, None, None


def attach_tables(network: Llama, tokens: Mapping[int, Sequence[int]], whole: Sequence[str]) -> None:
    """Train the rows of `tokens` (id to the ids of its pieces, none for a token that keeps its row), and the tables
    named in `whole`. Ids beyond the tables make them larger. A new row starts at the mean of its pieces' rows.
    """
    embedding, head = network.decoder.embed_tokens, network.lm_head
    network.plain_tables = (network.arch, embedding.weight, head.weight)
    is_tied = network.arch.tie_word_embeddings
    set_tables(network, _copy(embedding.weight), None if is_tied else _copy(head.weight))
    grow(network, max([network.arch.vocab_size, *(number + 1 for number in tokens)]))
    for name, module in ((EMBEDDING, embedding), (HEAD, head)):
        is_whole = bool(whole) if is_tied else name in whole
        if (name == HEAD and is_tied) or not (is_whole or tokens):
            continue
        table = module.weight.detach()
        wide = table.to(torch.promote_types(table.dtype, torch.float32))
        start = {
            number: wide[torch.tensor(pieces, device=table.device)].mean(0)
            for number, pieces in tokens.items()
            if pieces
        }
        wide = wide.clone() if is_whole else wide
        ids = torch.tensor(list(tokens), device=table.device)
        rows = wide if is_whole else wide[ids]
        for at, number in enumerate(tokens):
            if number in start:
                rows[number if is_whole else at] = start[number]
        network.tables[name] = TableRows(table, None if is_whole else ids, rows)


def without_gaps(tokens: Mapping[int, Sequence[int]], size: int) -> dict[int, Sequence[int]]:
    """`tokens` with every id between the `size` of the tables and the largest one, so that no row is unknown."""
    gaps = range(size, max(tokens, default=-1) + 1)
    return dict(sorted({**dict.fromkeys(gaps, ()), **tokens}.items()))


def detach_tables(network: Llama) -> None:
    """Undo `attach_tables`."""
    if network.plain_tables is not None:
        arch, embedding, head = network.plain_tables
        network.arch, network.plain_tables, network.tables = arch, None, nn.ModuleDict()
        network.decoder.embed_tokens.weight, network.lm_head.weight = embedding, head


def table_rows(network: nn.Module) -> dict[str, TableRows]:
    """The trained tables by name."""
    return dict(getattr(network, "tables", {}).items())


def stored_tables(network: nn.Module) -> dict[str, nn.Parameter]:
    """The trained rows by full name, as PEFT stores them; a tied table that is trained whole is in the file twice."""
    found: dict[str, nn.Parameter] = {}
    for name, table in table_rows(network).items():
        assert isinstance(network, Llama)
        module = network.arch.embedding if name == EMBEDDING else HEAD
        found[f"{module}.{TOKENS if table.ids is not None else 'weight'}"] = table.rows
        if table.ids is None and network.arch.tie_word_embeddings:
            found[f"{HEAD}.weight"] = table.rows
    return found


def grown(table: Tensor, size: int) -> Tensor:
    """`table` with rows up to `size`: the new ones are the mean of the others."""
    if size <= len(table):
        return table
    mean = table.double().mean(0).to(table.dtype)
    return torch.cat([table, mean.expand(size - len(table), -1)])


def grow(network: Llama, size: int) -> None:
    """Make both tables larger, up to `size` tokens."""
    if size > network.arch.vocab_size:
        embedding, head = network.decoder.embed_tokens.weight, network.lm_head.weight
        is_tied = head is embedding
        set_tables(network, grown(embedding.detach(), size), None if is_tied else grown(head.detach(), size))
        network.arch = replace(network.arch, vocab_size=size)


def set_tables(network: Llama, embedding: Tensor, head: Tensor | None) -> None:
    """Put tables into `network`, frozen; None for a head that is the embedding."""
    network.decoder.embed_tokens.weight = nn.Parameter(embedding, requires_grad=False)
    network.lm_head.weight = (
        network.decoder.embed_tokens.weight if head is None else nn.Parameter(head, requires_grad=False)
    )


def _copy(table: Tensor) -> Tensor:
    """Memory of its own: a table may be mapped to its file."""
    return table.detach().clone()
