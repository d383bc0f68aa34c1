"""Continuous batching, the one decode loop: rows join and leave between passes, each with its own settings.

Token ids in, token ids out, one thread, no queue (infer/scheduler.py has both). Prompts are read in a pass of their
own. A later pass adds a token to every row. With the compiled kernels, a row's numbers have the same bits whatever its
neighbours are.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from lorafit.data.packing import share_prefixes
from lorafit.infer.engine import Decode, Extend, KeyValueCache, Prefill
from lorafit.infer.kept_prompts import KeptPrompts, cuts
from lorafit.infer.recorded_pass import RecordedPass
from lorafit.infer.sampling import Sampling, next_tokens
from lorafit.model.llama import Llama
from lorafit.model.multi_lora import Adapters

AT_ONCE = 16  # rows of a batch that answers a list of prompts
_PREFILL_TOKENS = 4096  # of prompts that `generate_tokens` reads in one pass; a longer prompt is read alone

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Request:
    """One answer to generate.

    `adapter` None is the network as it is. `stream` numbers the answers that share a seed, so that their random
    numbers differ. With `top_logprobs`, each token comes with its log-probability and those of that many most probable
    tokens.
    """

    prompt: Sequence[int]
    stop_ids: frozenset[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stream: int = 0
    adapter: str | None = None
    top_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class GeneratedToken:
    """One new token of a row. `end` is set on the last one: `stop` (not part of the answer) or `length`.

    `logprob` and `top` (id and log-probability, most probable first) are of the model's distribution at temperature 1.
    """

    id: int
    end: str = ""
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class _Row(Generic[K]):
    key: K
    request: Request
    random: torch.Generator
    num_generated: int = 0
    latest: int = 0


class ContinuousBatch(Generic[K]):
    """The rows that are being answered. Keys are the caller's names for rows.

    With `kept`, prompts are read one after the other, in pieces, and beginnings that were read before are not read
    again. A network with other mixers than attention reads every prompt as a whole.
    """

    def __init__(
        self,
        network: Llama,
        num_slots: int,
        context: int | None = None,
        adapters: Adapters | None = None,
        kept: KeptPrompts | None = None,
    ) -> None:
        self.network, self.num_slots, self.adapters = network, num_slots, adapters
        self.kept = kept if len(network.arch.attention_layers) == network.arch.num_hidden_layers else None
        longest = network.arch.max_position_embeddings
        self.context = min(context or longest, longest)
        self._rows: list[_Row[K]] = []
        self._cache = self._new_cache()
        # passes over this memory of the cache, by the adapters of the rows, latest last
        self._passes: dict[tuple[str | None, ...], RecordedPass] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def bytes_per_slot(self) -> int:
        """Most bytes of keys and values of one answer with its prompt."""
        return self.context * self._cache.bytes_per_token

    @torch.inference_mode()
    def add(self, requests: Sequence[tuple[K, Request]]) -> list[tuple[K, GeneratedToken]]:
        """Read the prompts and give the first token of each. Rows that have not ended stay.

        There must be a free slot for each, and all must have the same adapter. Raises ValueError where a prompt has no
        token, or not fewer than `context`.
        """
        first = len(self)
        lengths = [len(request.prompt) for _, request in requests]
        if not all(0 < length < self.context for length in lengths):
            raise ValueError(f"a prompt has no token, or {self.context:,} and more")
        assert first + len(requests) <= self.num_slots
        assert len({request.adapter for _, request in requests}) == 1
        self._make_room(max(lengths), [request for _, request in requests])
        self._use_adapters([requests[0][1].adapter])
        try:
            if self.kept is None:
                logits = self._read([request for _, request in requests])
            else:
                logits = torch.cat([self._read_pieces(request, self.kept) for _, request in requests])
        except BaseException:
            self._cache.lengths = self._cache.lengths[:first]
            raise
        self._rows += [
            _Row(key, request, request.sampling.stream(request.stream)) for key, request in requests
        ]
        return self._choose_next(logits, self._rows[first:])

    @torch.inference_mode()
    def step(self) -> list[tuple[K, GeneratedToken]]:
        """One more token for every row. Rows that have ended are removed."""
        if not self._rows:
            return []
        rows = list(self._rows)
        self._make_room(int(self._cache.lengths.max()) + 1, [row.request for row in rows])
        self._use_adapters([row.request.adapter for row in rows])
        latest = torch.tensor([row.latest for row in rows], device=self._cache.lengths.device)
        return self._choose_next(self._decode(latest), rows)

    def drop(self, key: K) -> None:
        """Remove the row of `key`, if it is still there."""
        for index, row in enumerate(self._rows):
            if row.key == key:
                self._cache.remove(index)
                last = self._rows.pop()
                if index < len(self._rows):
                    self._rows[index] = last
                return

    def clear(self) -> list[K]:
        """Remove all rows and free their memory, to continue after an error. Returns their keys."""
        keys = [row.key for row in self._rows]
        self._rows = []
        self._cache, self._passes = self._new_cache(), {}
        return keys

    def _read(self, requests: Sequence[Request]) -> Tensor:
        """The logits after each prompt, in one pass that reads shared beginnings once."""
        lengths = [len(request.prompt) for request in requests]
        fixed = self.network.arch.fixed_up_to
        ids, paths = share_prefixes(
            [np.array(request.prompt, np.uint32) for request in requests],
            may_share=fixed is None or max(lengths) <= fixed,
        )
        cache = self._cache
        device = cache.lengths.device
        last = torch.tensor([path[-1] for path in paths], device=device)
        prefill = Prefill(lengths, cache, len(cache.lengths), torch.from_numpy(np.concatenate(paths)))
        return self.network.logits(self.network.hidden(torch.from_numpy(ids).to(device), prefill, last))

    def _read_pieces(self, request: Request, kept: KeptPrompts) -> Tensor:
        """The logits after a prompt, whose beginning may be kept."""
        cache, prompt = self._cache, request.prompt
        fixed = self.network.arch.fixed_up_to
        if fixed is not None and len(prompt) > fixed:  # the angles depend on the length of the prompt
            return self._read([request])
        row, ids = len(cache.lengths), torch.tensor(prompt, device=cache.lengths.device)
        start = kept.read(request.adapter, prompt, cache, row)
        cache.lengths = torch.cat([cache.lengths, cache.lengths.new_tensor([start])])
        for end in [*(cut for cut in cuts(len(prompt)) if cut > start), len(prompt)]:
            last = torch.tensor([end - start - 1], device=ids.device)
            hidden = self.network.hidden(ids[start:end], Extend(cache, end - start), last)
            start = end
        kept.keep(request.adapter, prompt, cache, row)
        return self.network.logits(hidden)

    def _decode(self, latest: Tensor) -> Tensor:
        """The logits after the tokens `latest`, one per row. Later passes of such rows repeat the kernel calls."""
        attend = Decode(self._cache)
        x = self.network.embedded(latest)
        form = tuple(row.request.adapter for row in self._rows)
        recorded = self._passes.pop(form, None)
        if recorded is not None:
            self._passes[form] = recorded
            return recorded.run(x, attend)
        # their buffers take memory: they have at most twice as many rows as there are slots
        while self._passes and sum(map(len, self._passes)) + len(form) > 2 * self.num_slots:
            del self._passes[next(iter(self._passes))]
        recorded = self._passes[form] = RecordedPass(self.network, x, attend)
        return recorded.logits

    def _new_cache(self) -> KeyValueCache:
        return KeyValueCache(
            self.network.arch, self.num_slots, self.context, self.network.decoder.final_norm.weight
        )

    def _make_room(self, length: int, requests: Sequence[Request]) -> None:
        most = max(len(request.prompt) + request.max_tokens for request in requests)
        before = self._cache.capacity
        self._cache.make_room(length, min(max(most, length), self.context))
        if self._cache.capacity != before:
            self._passes.clear()

    def _use_adapters(self, names: Sequence[str | None]) -> None:
        if self.adapters is not None:
            self.adapters.take(names)

    def _choose_next(self, logits: Tensor, rows: Sequence[_Row[K]]) -> list[tuple[K, GeneratedToken]]:
        tokens = []
        for index, (row, token) in enumerate(zip(rows, _sample(logits, rows), strict=True)):
            row.num_generated, row.latest = row.num_generated + 1, token
            is_full = row.num_generated >= row.request.max_tokens
            is_full = is_full or len(row.request.prompt) + row.num_generated >= self.context
            end = "stop" if token in row.request.stop_ids else "length" if is_full else ""
            tokens.append((row.key, _generated_token(token, end, row.request.top_logprobs, logits[index])))
        for key, generated in tokens:
            if generated.end:
                self.drop(key)
        return tokens


def generate_tokens(network: Llama, requests: Sequence[Request]) -> Iterator[tuple[int, GeneratedToken]]:
    """Answer all requests, up to AT_ONCE of them at a time: (index of the request, token), as they are generated.

    A row ends with a token of `stop_ids`, after `max_tokens`, or at the model's longest position. Raises ValueError as
    `ContinuousBatch.add` does.
    """
    batch = ContinuousBatch[int](network, min(AT_ONCE, len(requests)))
    waiting = deque(enumerate(requests))
    while waiting or len(batch):
        joining: list[tuple[int, Request]] = []
        num_tokens = 0
        while waiting and len(batch) + len(joining) < batch.num_slots:
            num_tokens += len(waiting[0][1].prompt)
            if joining and num_tokens > _PREFILL_TOKENS:
                break
            joining.append(waiting.popleft())
        if joining:
            yield from batch.add(joining)
        else:
            yield from batch.step()


def _sample(logits: Tensor, rows: Sequence[_Row[K]]) -> list[int]:
    """The next token of each row. Rows with the same sampling are drawn together."""
    groups: dict[Sampling, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(dataclasses.replace(row.request.sampling, seed=0), []).append(index)
    chosen = [0] * len(rows)
    for sampling, group in groups.items():
        part = logits if len(group) == len(rows) else logits[group]
        tokens = next_tokens(part, sampling, [rows[index].random for index in group])
        for index, token in zip(group, tokens, strict=True):
            chosen[index] = token
    return chosen


def _generated_token(token: int, end: str, num_top: int | None, logits: Tensor) -> GeneratedToken:
    """The token, with log-probabilities in float64 unless `num_top` is None; `logits` (vocab_size,) are its row's."""
    if num_top is None:
        return GeneratedToken(token, end)
    logprobs = logits.double().cpu().log_softmax(-1)
    best = logprobs.topk(min(num_top, len(logprobs)))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return GeneratedToken(token, end, float(logprobs[token]), top)
