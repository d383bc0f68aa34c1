"""Token ids in, token ids out: batched generation with a key-value cache. It knows nothing of text.

Prompts of any mix of lengths are read in one packed pass, without padding, and what they begin alike with is read
once; after that every row adds one token a pass, and a row that has stopped leaves the batch. On the CPU a later pass
runs on compiled kernels (model/decode_linear.py, model/native/decode.cpp), because it is bound by reading weights and
by what is around the products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lorafit.data.packing import share_prefixes
from lorafit.infer.sampling import Sampling, next_tokens
from lorafit.model.architecture import Architecture
from lorafit.model.attention import PackedDocuments, Rotary, rotate
from lorafit.model.llama import Llama
from lorafit.model.native import fits, kernels


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token of one row. `end` is set on a row's last: `stop` (not to be shown) or `length`."""

    row: int
    id: int
    end: str = ""


class KeyValueCache:
    """Keys and values of every layer, each (slots, kv_heads, capacity, head_dim); `slots` has the slot of each row."""

    def __init__(self, arch: Architecture, num_rows: int, capacity: int, like: Tensor) -> None:
        shape = (num_rows, arch.num_key_value_heads, capacity, arch.head_dim)
        self.k = [like.new_zeros(shape) for _ in range(arch.num_hidden_layers)]
        self.v = [like.new_zeros(shape) for _ in range(arch.num_hidden_layers)]
        self.slots = torch.arange(num_rows, device=like.device)
        self.lengths = torch.zeros_like(self.slots)

    def keep(self, rows: list[int]) -> None:
        """Drop every row but `rows`."""
        index = torch.tensor(rows, device=self.lengths.device)
        self.lengths = self.lengths[index]
        if fits(self.k[0]):
            self.slots = self.slots[index]
            return
        self.k = [k.index_select(0, index) for k in self.k]  # torch attends to neighbouring slots only
        self.v = [v.index_select(0, index) for v in self.v]
        self.slots = self.slots[: len(rows)]


class Prefill(PackedDocuments):
    """Attention of the first pass: packed prompts that see themselves, and fill the cache from row `first` on."""

    def __init__(
        self, lengths: Sequence[int], cache: KeyValueCache, first: int = 0, index: Tensor | None = None
    ) -> None:
        super().__init__(lengths, cache.lengths.device, index)
        self.cache, self.first = cache, first
        added = torch.tensor(self.lengths, device=cache.lengths.device)
        cache.lengths = torch.cat([cache.lengths[:first], added])

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary, window: int | None
    ) -> Tensor:
        whole = (self.apart(x).split(self.lengths) for x in (rotate(k, rotary), v))
        for row, (k_doc, v_doc) in enumerate(zip(*whole, strict=True), self.first):
            self.cache.k[layer][row, :, : len(k_doc)] = k_doc.transpose(0, 1)
            self.cache.v[layer][row, :, : len(v_doc)] = v_doc.transpose(0, 1)
        return super().__call__(layer, q, k, v, rotary, window)


class Decode:
    """Attention of every later pass: one new token a row, which sees the row's cache."""

    def __init__(self, cache: KeyValueCache) -> None:
        self.cache = cache
        self.positions = cache.lengths
        cache.lengths = cache.lengths + 1
        self.longest = int(cache.lengths.max())

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary, window: int | None
    ) -> Tensor:
        k_cache, v_cache, compiled = self.cache.k[layer], self.cache.v[layer], kernels()
        if compiled is None or not fits(q, k, v):
            seen = (k_cache[: len(q), :, : self.longest], v_cache[: len(q), :, : self.longest])
            return decode_attention(q, k, v, rotary, window, *seen, self.positions)
        (rows, heads, size), (_, kv_heads, capacity, _), out = q.shape, k_cache.shape, torch.empty_like(q)
        shape = (rows, heads, kv_heads, size, capacity, window or 0)
        where = (self.cache.slots, self.positions)
        compiled.call("attend_cache", q.dtype, *shape, *where, q, k, v, *rotary, k_cache, v_cache, out)
        return out


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: Rotary,
    window: int | None,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
) -> Tensor:
    """What model/native/decode.cpp computes, in torch, for row r in slot r; the caches end with the longest row."""
    q, k = rotate(q, rotary), rotate(k, rotary)
    rows = torch.arange(len(q), device=q.device)
    k_cache[rows, :, positions] = k
    v_cache[rows, :, positions] = v
    at = torch.arange(k_cache.shape[2], device=q.device)
    visible = at <= positions[:, None]  # (rows, longest)
    if window is not None:
        visible &= at > positions[:, None] - window
    out = F.scaled_dot_product_attention(
        q[:, :, None],
        k_cache,
        v_cache,
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

    A row ends with a token of `stop_ids`, after `max_tokens`, or at the model's longest position. Raises ValueError
    where a prompt has no token: there is nothing to go on from.
    """
    if not all(prompts):
        raise ValueError("a prompt has no token")
    device = network.lm_head.weight.device
    limit = network.arch.max_position_embeddings
    lengths = [len(prompt) for prompt in prompts]
    capacity = min(limit, max(lengths) + max_tokens)
    cache = KeyValueCache(network.arch, len(prompts), capacity, network.model.norm.weight)
    rows = list(range(len(prompts)))
    streams = sampling.streams(len(prompts))
    ids, paths = share_prefixes([np.array(prompt, np.uint32) for prompt in prompts])
    index = torch.from_numpy(np.concatenate(paths))
    last = torch.tensor([path[-1] for path in paths], device=device)
    hidden = network.hidden(torch.from_numpy(ids).to(device), Prefill(lengths, cache, index=index), last)
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
        hidden = network.hidden(latest, Decode(cache))
