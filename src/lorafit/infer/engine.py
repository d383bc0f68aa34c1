"""Token ids in, token ids out: batched generation with a key-value cache. It knows nothing of text.

Prompts of any mix of lengths are read in one packed pass, without padding; after that every row adds one token a
pass, and a row that has stopped leaves the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafit.infer.sampling import Sampling, next_tokens
from lorafit.model.architecture import Architecture
from lorafit.model.attention import PackedDocuments
from lorafit.model.llama import Llama


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token of one row. `end` is set on a row's last: `stop` (not to be shown) or `length`."""

    row: int
    id: int
    end: str = ""


class KeyValueCache:
    """Keys and values of every layer for a batch of rows, each (rows, kv_heads, capacity, head_dim)."""

    def __init__(self, arch: Architecture, num_rows: int, capacity: int, like: Tensor) -> None:
        shape = (num_rows, arch.num_key_value_heads, capacity, arch.head_dim)
        self.k = [like.new_zeros(shape) for _ in range(arch.num_hidden_layers)]
        self.v = [like.new_zeros(shape) for _ in range(arch.num_hidden_layers)]
        self.lengths = torch.zeros(num_rows, dtype=torch.int64, device=like.device)

    def keep(self, rows: list[int]) -> None:
        """Drop every row but `rows`."""
        index = torch.tensor(rows, device=self.lengths.device)
        self.k = [k.index_select(0, index) for k in self.k]
        self.v = [v.index_select(0, index) for v in self.v]
        self.lengths = self.lengths[index]


class ReadPrompts(PackedDocuments):
    """Attention of the first pass: packed prompts that see themselves, and fill the cache."""

    def __init__(self, lengths: Sequence[int], cache: KeyValueCache) -> None:
        super().__init__(lengths, cache.lengths.device)
        self.cache = cache
        cache.lengths = torch.tensor(self.lengths, device=cache.lengths.device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        for row, (k_doc, v_doc) in enumerate(zip(k.split(self.lengths), v.split(self.lengths), strict=True)):
            self.cache.k[layer][row, :, : len(k_doc)] = k_doc.transpose(0, 1)
            self.cache.v[layer][row, :, : len(v_doc)] = v_doc.transpose(0, 1)
        return super().__call__(layer, q, k, v, window)


class AddToken:
    """Attention of every later pass: one new token a row, which sees the row's cache."""

    def __init__(self, cache: KeyValueCache) -> None:
        self.cache = cache
        self.positions = cache.lengths
        cache.lengths = cache.lengths + 1
        self.longest = int(cache.lengths.max())

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        rows = torch.arange(len(q), device=q.device)
        k_cache, v_cache = self.cache.k[layer], self.cache.v[layer]
        k_cache[rows, :, self.positions] = k
        v_cache[rows, :, self.positions] = v
        at = torch.arange(self.longest, device=q.device)
        visible = at <= self.positions[:, None]  # (rows, longest)
        if window is not None:
            visible &= at > self.positions[:, None] - window
        out = F.scaled_dot_product_attention(
            q[:, :, None],
            k_cache[:, :, : self.longest],
            v_cache[:, :, : self.longest],
            attn_mask=visible[:, None, None],
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out[:, :, 0]  # (rows, heads, head_dim)


@torch.inference_mode()
def stream(
    network: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: AbstractSet[int],
    max_tokens: int,
    sampling: Sampling,
) -> Iterator[Token]:
    """Generate for all prompts at once; tokens come as they are made, row by row within a pass.

    A row ends with a token of `stop_ids`, after `max_tokens`, or at the model's longest position.
    """
    device = network.lm_head.weight.device
    limit = network.arch.max_position_embeddings
    lengths = [len(prompt) for prompt in prompts]
    capacity = min(limit, max(lengths) + max_tokens)
    cache = KeyValueCache(network.arch, len(prompts), capacity, network.model.norm.weight)
    rows = list(range(len(prompts)))
    streams = sampling.streams(len(prompts))
    ids = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    hidden = network.hidden(ids, ReadPrompts(lengths, cache))
    hidden = hidden[torch.tensor(lengths, device=device).cumsum(0) - 1]
    for made in range(1, max_tokens + 1):
        tokens = next_tokens(network.logits(hidden), sampling, [streams[row] for row in rows])
        going = []
        for at, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            full = made == max_tokens or lengths[row] + made >= limit
            end = "stop" if token in stop_ids else "length" if full else ""
            yield Token(row, token, end)
            if not end:
                going.append(at)
        if not going:
            return
        if len(going) < len(rows):
            cache.keep(going)
            rows = [rows[at] for at in going]
        latest = torch.tensor([tokens[at] for at in going], device=device)
        hidden = network.hidden(latest, AddToken(cache))
