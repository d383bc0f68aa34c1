"""Continuous batching: rows join and leave between passes, each with its own adapter, sampling and end.

Token ids in, token ids out, one thread, no queue (infer/scheduler.py has both). A prompt is read in a pass of its own,
as `stream` of infer/engine.py reads a single one; later passes add a token to every row. Where the compiled kernels
run, a row's numbers are the same bits whatever its neighbours are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorafit.infer.engine import Decode, KeyValueCache, Prefill
from lorafit.infer.sampling import Sampling, next_tokens
from lorafit.model.architecture import Architecture
from lorafit.model.llama import Llama
from lorafit.model.multi_lora import Adapters

_FIRST_CAPACITY = 256  # tokens a slot has room for at first


@dataclass(frozen=True, slots=True)
class Request:
    """One answer that is wanted.

    `adapter` None is the network as it is. `stream` numbers the answers that share a seed, so that they are drawn
    apart. With `top_logprobs` each token comes with its log-probability and those of so many likeliest ones.
    """

    prompt: Sequence[int]
    stop_ids: frozenset[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stream: int = 0
    adapter: str | None = None
    top_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One more token of a row. `end` is set on the last: `stop` (not to be shown) or `length`.

    `logprob` and `top` (id and log-probability, likeliest first) are of the model's distribution at temperature 1.
    """

    id: int
    end: str = ""
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


class Slots(KeyValueCache):
    """A cache for up to `num_slots` rows that come and go; row r is in slot r, and capacity grows as it is needed."""

    def __init__(self, arch: Architecture, num_slots: int, limit: int, like: Tensor) -> None:
        super().__init__(arch, num_slots, min(_FIRST_CAPACITY, limit), like)
        self.limit = limit
        self.lengths = self.lengths[:0]

    @torch.inference_mode()
    def make_room(self, length: int) -> None:
        """Have room for `length` tokens in every slot. Raises what torch raises when memory is short."""
        capacity = self.k[0].shape[2]
        if length <= capacity:
            return
        while capacity < length:
            capacity = min(2 * capacity, self.limit)
        for cache in (self.k, self.v):
            for layer, old in enumerate(cache):
                new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
                new[:, :, : old.shape[2]] = old
                cache[layer] = new

    @torch.inference_mode()
    def leave(self, row: int) -> None:
        """Drop a row; the last one takes its place."""
        last = len(self.lengths) - 1
        if row != last:
            length = int(self.lengths[last])
            for layer in (*self.k, *self.v):
                layer[row, :, :length] = layer[last, :, :length]
            self.lengths[row] = self.lengths[last]
        self.lengths = self.lengths[:last]


@dataclass(slots=True)
class _Row:
    key: Hashable
    request: Request
    random: torch.Generator
    num_made: int = 0
    latest: int = 0


class Batch:
    """The rows that are being answered. Keys are the caller's names for rows."""

    def __init__(
        self, network: Llama, num_slots: int, context: int | None = None, adapters: Adapters | None = None
    ) -> None:
        self.network, self.num_slots, self.adapters = network, num_slots, adapters
        longest = network.arch.max_position_embeddings
        self.context = min(context or longest, longest)
        self._rows: list[_Row] = []
        self._cache = self._new_cache()

    def __len__(self) -> int:
        return len(self._rows)

    @torch.inference_mode()
    def add(self, key: Hashable, request: Request) -> Step:
        """Read a prompt and give its first token; the row stays for more unless that was its last.

        There must be a free slot, and the prompt must have a token and be shorter than `context`.
        """
        assert len(self) < self.num_slots
        assert 0 < len(request.prompt) < self.context
        first, length = len(self), len(request.prompt)
        self._cache.make_room(length)
        self._take([request.adapter])
        device = self._cache.lengths.device
        ids, last = torch.tensor(request.prompt, device=device), torch.tensor([length - 1], device=device)
        try:
            logits = self.network.logits(
                self.network.hidden(ids, Prefill([length], self._cache, first), last)
            )
        except BaseException:
            self._cache.lengths = self._cache.lengths[:first]
            raise
        self._rows.append(_Row(key, request, request.sampling.stream(request.stream)))
        return self._advance(logits, self._rows[first:])[0][1]

    @torch.inference_mode()
    def step(self) -> list[tuple[Hashable, Step]]:
        """One more token for every row; those whose last it was are gone afterwards."""
        if not self._rows:
            return []
        rows = list(self._rows)
        self._cache.make_room(int(self._cache.lengths.max()) + 1)
        self._take([row.request.adapter for row in rows])
        latest = torch.tensor([row.latest for row in rows], device=self._cache.lengths.device)
        return self._advance(self.network.logits(self.network.hidden(latest, Decode(self._cache))), rows)

    def drop(self, key: Hashable) -> None:
        """Forget a row that nobody waits for, if it is still there."""
        for at, row in enumerate(self._rows):
            if row.key == key:
                self._cache.leave(at)
                last = self._rows.pop()
                if at < len(self._rows):
                    self._rows[at] = last
                return

    def clear(self) -> list[Hashable]:
        """Forget all rows, and the memory they had; their keys. To go on after an error."""
        keys = [row.key for row in self._rows]
        self._rows = []
        self._cache = self._new_cache()
        return keys

    def _new_cache(self) -> Slots:
        return Slots(self.network.arch, self.num_slots, self.context, self.network.model.norm.weight)

    def _take(self, names: Sequence[str | None]) -> None:
        if self.adapters is not None:
            self.adapters.take(names)

    def _advance(self, logits: Tensor, rows: Sequence[_Row]) -> list[tuple[Hashable, Step]]:
        steps = []
        likely = _logprobs(logits, rows)
        for at, (row, token) in enumerate(zip(rows, _choose(logits, rows), strict=True)):
            row.num_made, row.latest = row.num_made + 1, token
            is_full = row.num_made >= row.request.max_tokens
            is_full = is_full or len(row.request.prompt) + row.num_made >= self.context
            end = "stop" if token in row.request.stop_ids else "length" if is_full else ""
            steps.append((row.key, _step(token, end, row.request.top_logprobs, likely.get(at))))
        for key, made in steps:
            if made.end:
                self.drop(key)
        return steps


def _choose(logits: Tensor, rows: Sequence[_Row]) -> list[int]:
    """The next token of each row, drawn together where rows are sampled alike."""
    alike: dict[Sampling, list[int]] = {}
    for at, row in enumerate(rows):
        alike.setdefault(dataclasses.replace(row.request.sampling, seed=0), []).append(at)
    chosen = [0] * len(rows)
    for sampling, some in alike.items():
        part = logits if len(some) == len(rows) else logits[some]
        for at, token in zip(
            some, next_tokens(part, sampling, [rows[at].random for at in some]), strict=True
        ):
            chosen[at] = token
    return chosen


def _logprobs(logits: Tensor, rows: Sequence[_Row]) -> dict[int, Tensor]:
    """Log-probabilities of all tokens, float64 (vocab_size,), for the rows that want them."""
    wanting = [at for at, row in enumerate(rows) if row.request.top_logprobs is not None]
    if not wanting:
        return {}
    return dict(zip(wanting, logits[wanting].double().cpu().log_softmax(-1), strict=True))


def _step(token: int, end: str, num_top: int | None, likely: Tensor | None) -> Step:
    if likely is None:
        return Step(token, end)
    best = likely.topk(min(num_top or 0, len(likely)))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Step(token, end, float(likely[token]), top)
