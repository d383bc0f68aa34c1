"""lm-evaluation-harness on a lorafit run: its tasks, our engine (extra `eval`).

    import lm_eval
    from lorafit.evaluate.lm_eval import LorafitLM

    results = lm_eval.simple_evaluate(LorafitLM("runs/demo"), tasks=["hellaswag"])

A text is encoded as in training: a context as if it stood alone, what is scored as its continuation. With the harness's
`apply_chat_template` a conversation becomes exactly the ids of the run's prompt contract.
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
from lorafit.infer.engine import stream
from lorafit.infer.model import load
from lorafit.infer.sampling import Sampling
from lorafit.model.attention import PackedDocuments
from lorafit.model.lora import disable_adapter
from lorafit.observe.progress import progress

_ROWS_AT_ONCE = 16
_MAX_TOKENS = 256

Scored = tuple[list[int], list[int]]  # ids of the context and of what is scored, never both empty


class LorafitLM(LM):  # type: ignore[misc]
    """A run, adapter or model as the harness asks it. `base` leaves the adapter out: the table's line before.

    `settings` are those of `lorafit.load`; `batch_tokens` bounds the tokens of a pass.
    """

    def __init__(
        self, source: str | Path, *, base: bool = False, batch_tokens: int = 2048, **settings: Any
    ) -> None:
        super().__init__()
        self._model = load(source, **settings)
        if base and not self._model.has_adapter:
            raise ModelError(f"`{source}` has no adapter to leave out")
        self._network = self._model.network.eval()
        self._renderer = self._model.renderer
        self._tokenizer = self._renderer.tokenizer
        self._base, self._batch_tokens = base, batch_tokens
        self._conversations: dict[str, list[int]] = {}
        self._longest = self._network.arch.max_position_embeddings

    @property
    def tokenizer_name(self) -> str:
        """Tells caches of the harness apart."""
        return f"lorafit-{self._renderer.contract.hash}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """For the harness's records; `apply_chat_template` does the work."""
        return self._renderer.contract.chat_template or self._renderer.contract.template

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a conversation as text; its ids are kept, for a text alone does not tell what is control."""
        if not add_generation_prompt:
            raise ModelError(
                "an answer that is begun for the model was never trained", hint="leave gen_prefix out"
            )
        messages = [Message(turn["role"], turn["content"]) for turn in chat_history]  # type: ignore[arg-type]
        text = "".join(self._renderer.prompt_text(messages))
        self._conversations[text] = self._renderer.prompt_ids(messages)
        return text

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For each (context, continuation): log-probability of the continuation, and whether greedy says it."""
        return self._score([self._pair(*request.args) for request in requests], "scoring")

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-probability of each whole text, cut into windows where the model cannot read it at once."""
        windows: list[Scored] = []
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
        """What the model says after each context, up to a stop token or any of the request's `until`."""
        said: list[str] = []
        with progress("generating") as advance, disable_adapter(self._network, when=self._base):
            for start in range(0, len(requests), _ROWS_AT_ONCE):
                for one in self._alike(requests[start : start + _ROWS_AT_ONCE]):
                    said += self._generate(*one)
                advance(len(said), len(requests))
        return said

    def _alike(self, requests: Sequence[Any]) -> list[tuple[list[str], dict[str, Any]]]:
        """Neighbouring requests with the same settings together."""
        groups: list[tuple[list[str], dict[str, Any]]] = []
        for context, settings in (request.args for request in requests):
            if groups and groups[-1][1] == settings:
                groups[-1][0].append(context)
            else:
                groups.append(([context], settings))
        return groups

    def _generate(self, contexts: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        most = min(int(settings.get("max_gen_toks") or _MAX_TOKENS), self._longest - 1)
        until = settings.get("until") or []
        ends = [until] if isinstance(until, str) else list(until)
        sampling = Sampling()
        if settings.get("do_sample") or settings.get("temperature"):
            top_k, top_p = int(settings.get("top_k") or 0), float(settings.get("top_p") or 1.0)
            sampling = Sampling(float(settings.get("temperature") or 1.0), top_k, top_p)
        prompts = [self._prompt(context)[-(self._longest - most) :] for context in contexts]
        rows: list[list[int]] = [[] for _ in prompts]
        stops = frozenset(self._renderer.contract.stop_ids)
        for token in stream(self._network, prompts, stop_ids=stops, max_tokens=most, sampling=sampling):
            if token.end != "stop":
                rows[token.row].append(token.id)
        return [_cut(self._tokenizer.decode(row, skip_special=True), ends) for row in rows]

    def _score(self, pairs: Sequence[Scored], title: str) -> list[tuple[float, bool]]:
        """Log-probability and greediness of every pair, several in a pass, the longest contexts first; what is scored
        after one context is neighbours.
        """
        found: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(pairs)), key=lambda index: (-len(pairs[index][0]), pairs[index][0]))
        with (
            progress(title) as advance,
            disable_adapter(self._network, when=self._base),
            torch.inference_mode(),
        ):
            while len(found) < len(order):
                batch: list[int] = []
                size = 0
                for index in order[len(found) :]:
                    size += sum(map(len, pairs[index]))
                    if batch and size > self._batch_tokens:
                        break
                    batch.append(index)
                for index, result in zip(batch, self._pass([pairs[index] for index in batch]), strict=True):
                    found[index] = result
                advance(len(found), len(order))
        return [found[index] for index in range(len(pairs))]

    def _pass(self, pairs: Sequence[Scored]) -> list[tuple[float, bool]]:
        device = self._network.lm_head.weight.device
        whole = [[*context, *continuation][-self._longest - 1 :] for context, continuation in pairs]
        given = [ids[:-1] for ids in whole]
        counts = [
            min(len(continuation), len(ids)) for (_, continuation), ids in zip(pairs, given, strict=True)
        ]
        tokens, paths = share_prefixes([np.array(ids, np.uint32) for ids in given])
        index = torch.from_numpy(np.concatenate(paths))
        attend = PackedDocuments(list(map(len, given)), device, index)
        rows = np.concatenate([path[len(path) - count :] for path, count in zip(paths, counts, strict=True)])
        hidden = self._network.hidden(
            torch.from_numpy(tokens).to(device), attend, torch.from_numpy(rows).to(device)
        )
        targets = [ids[len(ids) - count :] for ids, count in zip(whole, counts, strict=True)]
        wanted = torch.tensor([token for row in targets for token in row], device=device)
        logits = self._network.logits(hidden).float()
        log_probabilities = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0]
        is_greedy = logits.argmax(-1) == wanted
        parts = zip(log_probabilities.split(counts), is_greedy.split(counts), strict=True)
        return [(float(part.sum()), bool(greedy.all())) for part, greedy in parts]

    def _pair(self, context: str, continuation: str) -> Scored:
        if context in self._conversations:
            ids, borders = next(self._tokenizer.encode_batch([f"{BORDER}{continuation}"]))
            return self._conversations[context], ids[borders[0] :]
        kept = context.rstrip(" ")  # a blank goes with the word that follows
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
        """What stands before the first token of a text that nothing precedes."""
        contract = self._renderer.contract
        first = contract.bos_id if contract.bos_id is not None else contract.eos_id
        if first is None:
            raise ModelError("the tokenizer names neither BOS nor EOS: nothing can stand before a text")
        return [first]


def _cut(text: str, ends: Sequence[str]) -> str:
    """`text` up to the first of `ends`."""
    return text[: min((at for end in ends if end and (at := text.find(end)) >= 0), default=len(text))]
