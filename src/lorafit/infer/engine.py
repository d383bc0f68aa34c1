"""The passes of generation, and their cache: prefill reads prompts, decode adds a token per row.

Prompts of any mix of lengths are read in one packed pass, without padding, and a prefix that they share is read once.
Where beginnings of prompts are kept (infer/kept_prompts.py), `Extend` reads the tokens that follow in a row.
On the CPU a decode pass runs on compiled kernels (model/decode_linear.py, model/native/decode.cpp): it is limited by
the reading of weights and by the operations around the products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafit.model.architecture import Architecture
from lorafit.model.attention import (
    PackedDocuments,
    Rotary,
    attend_kernel,
    capped_attention,
    normed,
    rotate,
)
from lorafit.model.convolution import latest
from lorafit.model.definitions import wide
from lorafit.model.delta_rule import delta_step
from lorafit.model.gpu_ops import HeadNorms
from lorafit.model.mixer_shapes import DeltaHeads
from lorafit.model.native import fits, kernels

_FIRST_CAPACITY = 256  # tokens per slot before the cache grows
_ROUNDED = 64  # on a GPU a pass sees a multiple of it


class KeyValueCache:
    """Keys and values of every layer that attends, each (slots, kv_heads, capacity, head_dim); of the other layers
    what they keep of the tokens so far, `states`, each (slots, ...). Rows join and leave.

    Row r is in slot r, and `lengths` int64 (rows,) has its tokens. The capacity grows when a row needs it.
    """

    def __init__(self, arch: Architecture, num_slots: int, limit: int, like: Tensor) -> None:
        self.capacity = min(_FIRST_CAPACITY, limit)
        shape = (num_slots, arch.num_key_value_heads, self.capacity, arch.head_dim)
        self.k = {layer: like.new_zeros(shape) for layer in arch.attention_layers}
        self.v = {layer: like.new_zeros(shape) for layer in arch.attention_layers}
        self.states = {
            # a convolution keeps tokens; what is summed over a text is in the type of sums
            layer: [
                like.new_zeros(num_slots, *state, dtype=like.dtype if len(state) == 2 else wide(like.dtype))
                for state in arch.mixer(layer).states
            ]
            for layer in range(arch.num_hidden_layers)
        }
        self.bytes_per_token = 2 * len(self.k) * shape[1] * shape[3] * like.itemsize
        self.slots = torch.arange(num_slots, device=like.device)
        self.lengths = torch.zeros_like(self.slots)[:0]

    @torch.inference_mode()
    def make_room(self, length: int, limit: int) -> None:
        """Grow to at least `length` and at most `limit` tokens per slot.

        Raises what torch raises when memory is short.
        """
        capacity = self.capacity
        if length <= capacity:
            return
        while capacity < length:
            capacity = min(2 * capacity, limit)
        for cache in (self.k, self.v):
            for layer, old in cache.items():
                new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
                new[:, :, : old.shape[2]] = old
                cache[layer] = new
        self.capacity = capacity

    @torch.inference_mode()
    def remove(self, row: int) -> None:
        """Remove a row. The last row moves to its slot."""
        last = len(self.lengths) - 1
        if row != last:
            length = int(self.lengths[last])
            for layer in (*self.k.values(), *self.v.values()):
                layer[row, :, :length] = layer[last, :, :length]
            for states in self.states.values():
                for state in states:
                    state[row] = state[last]
            self.lengths[row] = self.lengths[last]
        self.lengths = self.lengths[:last]


class Prefill(PackedDocuments):
    """Attention of a pass over packed prompts: each sees itself, and they fill the cache from row `first` on."""

    def __init__(self, lengths: Sequence[int], cache: KeyValueCache, first: int, index: Tensor) -> None:
        super().__init__(lengths, cache.lengths.device, index)
        self.cache, self.first = cache, first
        added = torch.tensor(self.lengths, device=cache.lengths.device)
        cache.lengths = torch.cat([cache.lengths[:first], added])

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
        q, k = normed(q, k, norms)
        documents = (self.apart(x).split(self.lengths) for x in (rotate(k, rotary), v))
        for row, (k_doc, v_doc) in enumerate(zip(*documents, strict=True), self.first):
            self.cache.k[layer][row, :, : len(k_doc)] = k_doc.transpose(0, 1)
            self.cache.v[layer][row, :, : len(v_doc)] = v_doc.transpose(0, 1)
        return super().__call__(layer, q, k, v, rotary, window, cap)

    def convolve(self, layer: int, x: Tensor, weight: Tensor) -> Tensor:
        tails, kept = self.cache.states[layer][0], weight.shape[-1] - 1
        for row, document in enumerate(self.apart(x).split(self.lengths), self.first):
            tail = document[max(0, len(document) - kept) :]
            tails[row] = F.pad(tail, (0, 0, kept - len(tail), 0))
        return super().convolve(layer, x, weight)

    def delta(self, layer: int, qkv: Tensor, g: Tensor, beta: Tensor, heads: DeltaHeads) -> Tensor:
        out, states = self.delta_and_states(qkv, g, beta, heads)
        self.cache.states[layer][1][self.first : self.first + len(states)] = states
        return out


class Extend:
    """Attention of a pass over the next `count` tokens of the last row, which see what the row holds already.

    Only for networks whose layers all attend: a convolution and a state would have to begin in the middle of a text.
    """

    def __init__(self, cache: KeyValueCache, count: int) -> None:
        self.cache, self.row = cache, len(cache.lengths) - 1
        self.start = int(cache.lengths[-1])
        self.end = self.start + count
        self.positions = torch.arange(self.start, self.end, device=cache.lengths.device)
        cache.lengths = torch.cat([cache.lengths[:-1], cache.lengths.new_tensor([self.end])])

    def lengths_seen(self) -> Tensor:
        return torch.full_like(self.positions, self.end)

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
        q, k = normed(q, k, norms)
        start, end = self.start, self.end
        k_seen, v_seen = (layers[layer][self.row, :, :end] for layers in (self.cache.k, self.cache.v))
        k_seen[:, start:] = rotate(k, rotary).transpose(0, 1)
        v_seen[:, start:] = v.transpose(0, 1)
        if q.shape[-1] % 16 == 0 and fits(q, k, v):
            k_all = torch.cat([k_seen[:, :start].transpose(0, 1), k])
            v_all = v_seen.transpose(0, 1).contiguous()
            q_all = torch.cat([q.new_zeros(start, *q.shape[1:]), q])
            cosine = F.pad(rotary[0], (0, 0, start, 0), value=1.0)  # what the row held is rotated
            sine = F.pad(rotary[1], (0, 0, start, 0))
            places = torch.tensor([0, end]), torch.arange(end), start
            out, _ = attend_kernel(*places, window or 0, cap, q_all, k_all, v_all, cosine, sine)
            return out[start:]
        columns = torch.arange(end, device=q.device)
        mask = columns <= self.positions[:, None]  # (count, end)
        if window is not None:
            mask &= columns > self.positions[:, None] - window
        queries = rotate(q, rotary).transpose(0, 1)  # (heads, count, head_dim)
        if cap:
            return capped_attention(queries, k_seen, v_seen, mask, cap).transpose(0, 1)
        groups = len(queries) // len(k_seen)
        k_all, v_all = k_seen.repeat_interleave(groups, 0), v_seen.repeat_interleave(groups, 0)
        out = F.scaled_dot_product_attention(queries[None], k_all[None], v_all[None], attn_mask=mask)
        return out[0].transpose(0, 1)

    def convolve(self, layer: int, x: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def delta(self, layer: int, qkv: Tensor, g: Tensor, beta: Tensor, heads: DeltaHeads) -> Tensor:
        raise NotImplementedError


class Decode:
    """Attention of a pass with one new token per row, which sees the row's cache."""

    def __init__(self, cache: KeyValueCache) -> None:
        self.cache = cache
        self.positions = cache.lengths
        cache.lengths = cache.lengths + 1
        longest = int(cache.lengths.max())
        if self.positions.is_cuda:  # cuDNN makes a plan for every new length
            longest = min(-(-longest // _ROUNDED) * _ROUNDED, cache.capacity)
        self.longest = longest

    def lengths_seen(self) -> Tensor:
        return self.positions + 1

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
        q, k = normed(q, k, norms)
        k_cache, v_cache = self.cache.k[layer], self.cache.v[layer]
        if not fits(q, k, v):
            seen = (k_cache[: len(q), :, : self.longest], v_cache[: len(q), :, : self.longest])
            return decode_attention(q, k, v, rotary, window, *seen, self.positions, cap)
        (rows, heads, size), (_, kv_heads, capacity, _), out = q.shape, k_cache.shape, torch.empty_like(q)
        shape = (rows, heads, kv_heads, size, capacity, window or 0, cap)
        compiled = kernels()
        assert compiled is not None
        slots_and_positions = (self.cache.slots, self.positions)
        compiled.call(
            "attend_cache", q.dtype, *shape, *slots_and_positions, q, k, v, *rotary, k_cache, v_cache, out
        )
        return out

    def convolve(self, layer: int, x: Tensor, weight: Tensor) -> Tensor:
        tails = self.cache.states[layer][0][: len(x)]
        window = torch.cat([tails, x[:, None]], 1)
        tails.copy_(window[:, 1:])
        return latest(window, weight)

    def delta(self, layer: int, qkv: Tensor, g: Tensor, beta: Tensor, heads: DeltaHeads) -> Tensor:
        return delta_step(qkv, g, beta, heads, self.cache.states[layer][1][: len(qkv)])


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: Rotary,
    window: int | None,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    cap: float = 0.0,
) -> Tensor:
    """The torch form of model/native/decode.cpp, for row r in slot r. The caches end with the longest row."""
    q, k = rotate(q, rotary), rotate(k, rotary)
    rows = torch.arange(len(q), device=q.device)
    k_cache[rows, :, positions] = k
    v_cache[rows, :, positions] = v
    columns = torch.arange(k_cache.shape[2], device=q.device)
    visible = columns <= positions[:, None]  # (rows, longest)
    if window is not None:
        visible &= columns > positions[:, None] - window
    if cap:
        return capped_attention(q[:, :, None], k_cache, v_cache, visible[:, None, None], cap)[:, :, 0]
    # The heads that share a key are queries of one head: with a mask, torch's fast kernels take no grouped heads.
    queries = q.unflatten(1, (k.shape[1], -1))  # (rows, kv_heads, heads per key, head_dim)
    out = F.scaled_dot_product_attention(queries, k_cache, v_cache, attn_mask=visible[:, None, None])
    return out.flatten(1, 2)  # (rows, heads, head_dim)
