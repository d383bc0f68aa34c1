"""An adapter of lm-evaluation-harness: its tasks, the engine of lorafit (extra `eval`).

    import lm_eval
    from lorafit.evaluate.lm_eval import LorafitLM

    results = lm_eval.simple_evaluate(LorafitLM("runs/demo"), tasks=["hellaswag"])

Text is encoded as in training: the context first, then the scored text as its continuation. With the harness's
`apply_chat_template`, a conversation has exactly the ids of the run's prompt contract.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lorafit.data.formats import Message
from lorafit.data.packing import share_prefixes
from lorafit.data.tokenizer import BORDER
from lorafit.errors import ModelError
from lorafit.infer.continuous_batch import Request
from lorafit.infer.model import load
from lorafit.infer.sampling import Sampling
from lorafit.model.attention import PackedDocuments
from lorafit.model.lora import disable_adapter
from lorafit.observe.progress import progress

_MAX_TOKENS = 256

ScoredIds = tuple[list[int], list[int]]  # ids of the context and of the scored text, never both empty


class LorafitLM(LM):  # type: ignore[misc]
    """A run, adapter or model for the harness. `base` disables the adapter, for the results before the training.

    `settings` are those of `lorafit.load`. `batch_tokens` limits the tokens of a pass.
    """

    def __init__(
        self, source: str | Path, *, base: bool = False, batch_tokens: int = 2048, **settings: Any
    ) -> None:
        super().__init__()
        self._model = load(source, **settings)
        if base and not self._model.has_adapter:
            raise ModelError(f"`{source}` is a base model: it has no adapter to disable")
        self._network = self._model.network.eval()
        self._renderer = self._model.renderer
        self._tokenizer = self._renderer.tokenizer
        self._base, self._batch_tokens = base, batch_tokens
        self._conversations: dict[str, list[int]] = {}
        self._longest = self._network.arch.max_position_embeddings

    @property
    def tokenizer_name(self) -> str:
        """The key of the harness's caches."""
        return f"lorafit-{self._renderer.contract.hash}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template, for the harness's records. `apply_chat_template` does not use it."""
        return self._renderer.contract.chat_template or self._renderer.contract.template

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a conversation as text. Its ids are kept: text alone does not identify control tokens."""
        if not add_generation_prompt:
            raise ModelError("a given beginning of the answer is not supported", hint="remove gen_prefix")
        messages = [Message(turn["role"], turn["content"]) for turn in chat_history]  # type: ignore[arg-type]
        text = "".join(self._renderer.prompt_text(messages))
        self._conversations[text] = self._renderer.prompt_ids(messages)
        return text

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For each (context, continuation): the continuation's log-probability, and whether it is the greedy answer."""
        return self._score([self._pair(*request.args) for request in requests], "scoring")

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-probability of each whole text, in windows where it is longer than the model's context."""
        windows: list[ScoredIds] = []
        owners: list[int] = []
        start = self._start()
        for owner, request in enumerate(requests):
            ids = self._tokenizer.encode(request.args[0])
            cut = get_rolling_token_windows(ids, start[0], self._longest, context_len=1)
            for context, continuation in map(make_disjoint_window, cut):
                windows.append((list(context), list(continuation)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (log_probability, _) in zip(owners, self._score(windows, "reading"), strict=True):
            totals[owner] += log_probability
        return totals

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answer to each context, up to a stop token or any text of the request's `until`."""
        prompts = [self._request(request, index) for index, request in enumerate(requests)]
        ids: list[list[int]] = [[] for _ in prompts]
        num_done = 0
        with progress("generating") as advance:
            for index, token in self._model.tokens(prompts, base=self._base):
                if token.end != "stop":
                    ids[index].append(token.id)
                if token.end:
                    num_done += 1
                    advance(num_done, len(prompts))
        texts = [self._tokenizer.decode(row, skip_special=True) for row in ids]
        return [
            _cut(text, request.args[1].get("until") or [])
            for text, request in zip(texts, requests, strict=True)
        ]

    def _request(self, request: Any, index: int) -> Request:
        context, settings = request.args
        most = min(int(settings.get("max_gen_toks") or _MAX_TOKENS), self._longest - 1)
        sampling = Sampling()
        if settings.get("do_sample") or settings.get("temperature"):
            top_k, top_p = int(settings.get("top_k") or 0), float(settings.get("top_p") or 1.0)
            sampling = Sampling(float(settings.get("temperature") or 1.0), top_k, top_p)
        prompt = self._prompt(context)[-(self._longest - most) :]
        return self._model.request(prompt, most, sampling, stream=index)

    def _score(self, pairs: Sequence[ScoredIds], title: str) -> list[tuple[float, bool]]:
        """Log-probability and greediness of every pair, several per pass.

        The longest contexts come first. Pairs with the same context are neighbours, so that a pass shares it.
        """
        order = sorted(range(len(pairs)), key=lambda index: (-len(pairs[index][0]), pairs[index][0]))
        results: dict[int, tuple[float, bool]] = {}
        with (
            progress(title) as advance,
            disable_adapter(self._network, when=self._base),
            torch.inference_mode(),
        ):
            while len(results) < len(order):
                batch: list[int] = []
                size = 0
                for index in order[len(results) :]:
                    size += sum(map(len, pairs[index]))
                    if batch and size > self._batch_tokens:
                        break
                    batch.append(index)
                results.update(zip(batch, self._pass([pairs[index] for index in batch]), strict=True))
                advance(len(results), len(order))
        return [results[index] for index in range(len(pairs))]

    def _pass(self, pairs: Sequence[ScoredIds]) -> list[tuple[float, bool]]:
        device = self._network.lm_head.weight.device
        whole = [[*context, *continuation][-self._longest - 1 :] for context, continuation in pairs]
        inputs = [ids[:-1] for ids in whole]
        counts = [
            min(len(continuation), len(ids)) for (_, continuation), ids in zip(pairs, inputs, strict=True)
        ]
        fixed = self._network.arch.fixed_up_to
        may_share = fixed is None or max(map(len, inputs)) <= fixed
        tokens, paths = share_prefixes([np.array(ids, np.uint32) for ids in inputs], may_share=may_share)
        index = torch.from_numpy(np.concatenate(paths))
        attend = PackedDocuments(list(map(len, inputs)), device, index)
        rows = np.concatenate([path[len(path) - count :] for path, count in zip(paths, counts, strict=True)])
        hidden = self._network.hidden(
            torch.from_numpy(tokens).to(device), attend, torch.from_numpy(rows).to(device)
        )
        targets = [ids[len(ids) - count :] for ids, count in zip(whole, counts, strict=True)]
        target_ids = torch.tensor([token for row in targets for token in row], device=device)
        logits = self._network.logits(hidden).float()
        log_probabilities = logits.log_softmax(-1).gather(1, target_ids[:, None])[:, 0]
        is_greedy = logits.argmax(-1) == target_ids
        parts = zip(log_probabilities.split(counts), is_greedy.split(counts), strict=True)
        return [(float(part.sum()), bool(greedy.all())) for part, greedy in parts]

    def _pair(self, context: str, continuation: str) -> ScoredIds:
        if context in self._conversations:
            ids, borders = next(self._tokenizer.encode_batch([f"{BORDER}{continuation}"]))
            return self._conversations[context], ids[borders[0] :]
        kept = context.rstrip(" ")  # a space belongs to the word that follows
        ids, borders = next(
            self._tokenizer.encode_batch([f"{kept}{BORDER}{context[len(kept) :]}{continuation}"])
        )
        border = borders[0]
        before = [*(self._bos() if kept else self._start()), *ids[:border]]
        return before or self._start(), ids[border:]

    def _prompt(self, context: str) -> list[int]:
        return (
            self._conversations.get(context)
            or [*self._bos(), *self._tokenizer.encode(context)]
            or self._start()
        )

    def _bos(self) -> list[int]:
        contract = self._renderer.contract
        return [contract.bos_id] if contract.add_bos and contract.bos_id is not None else []

    def _start(self) -> list[int]:
        """The token before the first one of a text without context."""
        contract = self._renderer.contract
        first = contract.bos_id if contract.bos_id is not None else contract.eos_id
        if first is None:
            raise ModelError(
                "the tokenizer has neither BOS nor EOS: the first token of a text cannot be scored"
            )
        return [first]


def _cut(text: str, until: str | Sequence[str]) -> str:
    """`text` up to the first of `until`."""
    ends = [until] if isinstance(until, str) else until
    return text[: min((start for end in ends if end and (start := text.find(end)) >= 0), default=len(text))]
