"""Keys and values of the beginnings of recent prompts, in pieces, so that a beginning that many share is read once.

A prompt is cut at places that depend on its length alone, and each piece is a pass of its own, whether the pieces
before it were read now or kept. So an answer has the same bits with and without what is kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from lorafit.infer.engine import KeyValueCache

PIECE, LONGEST = 64, 512  # tokens of the shortest and of the longest piece
TAIL = (
    32  # fewest tokens of the last pass: products of fewer rows are computed in another way (model/linear.py)
)

# The piece before it, or the adapter of a first piece, and the piece's own tokens.
_Key = tuple[int | str | None, bytes]


@dataclass(frozen=True, slots=True)
class Piece:
    """Keys and values of the tokens from `start` to `end`, each (layers, kv_heads, tokens, head_dim)."""

    number: int
    start: int
    end: int
    k: Tensor
    v: Tensor

    @property
    def num_bytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


def cuts(length: int) -> list[int]:
    """Where a prompt of `length` tokens is cut: the same places in all prompts, farther apart the later they are.

    What lies behind the last cut of a shared beginning is less than PIECE tokens, or than a quarter of what comes
    before that cut.
    """
    places, cut = [], PIECE
    while cut + TAIL <= length:
        places.append(cut)
        eighth = 1 << cut.bit_length() - 3  # between an eighth and a quarter of what comes before
        cut += min(max(PIECE, eighth), LONGEST)
    return places


class KeptPrompts:
    """At most `limit` bytes of pieces; those that were not used for the longest time are dropped first.

    A piece belongs to the adapter that computed it and to all tokens before it.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.num_bytes = limit, 0
        self._pieces: OrderedDict[_Key, Piece] = OrderedDict()  # the least recently used first
        self._count = 0

    def read(self, adapter: str | None, prompt: Sequence[int], cache: KeyValueCache, row: int) -> int:
        """Put the longest kept beginning of `prompt` into an empty row of the cache; returns its tokens."""
        end = 0
        for piece in self._find(adapter, prompt):
            for index, layer in enumerate(cache.k):
                cache.k[layer][row, :, piece.start : piece.end] = piece.k[index]
                cache.v[layer][row, :, piece.start : piece.end] = piece.v[index]
            end = piece.end
        return end

    def keep(self, adapter: str | None, prompt: Sequence[int], cache: KeyValueCache, row: int) -> None:
        """Keep the pieces of `prompt`, which the row of the cache holds, as far as they fit the limit."""
        found = self._find(adapter, prompt)
        before: int | str | None = found[-1].number if found else adapter
        for start, cut in _pieces(len(prompt))[len(found) :]:
            if cut * cache.bytes_per_token > self.limit:
                break
            while self.num_bytes + (cut - start) * cache.bytes_per_token > self.limit:
                _, dropped = self._pieces.popitem(last=False)
                self.num_bytes -= dropped.num_bytes
            k, v = (
                torch.stack([layer[row, :, start:cut] for layer in layers.values()])
                for layers in (cache.k, cache.v)
            )
            self._count += 1
            key = (before, _bytes(prompt[start:cut]))
            self._pieces[key] = piece = Piece(self._count, start, cut, k, v)
            self.num_bytes += piece.num_bytes
            before = piece.number
        self._find(adapter, prompt)

    def _find(self, adapter: str | None, prompt: Sequence[int]) -> list[Piece]:
        """The kept pieces that `prompt` begins with. They were used now: each after those that follow it."""
        before: int | str | None = adapter
        used: list[tuple[_Key, Piece]] = []
        for start, cut in _pieces(len(prompt)):
            key = (before, _bytes(prompt[start:cut]))
            if (piece := self._pieces.get(key)) is None:
                break
            used.append((key, piece))
            before = piece.number
        for key, _ in reversed(used):
            self._pieces.move_to_end(key)
        return [piece for _, piece in used]


def _pieces(length: int) -> list[tuple[int, int]]:
    return list(pairwise([0, *cuts(length)]))


def _bytes(ids: Sequence[int]) -> bytes:
    return np.array(ids, np.uint32).tobytes()
