"""How far a tuned model has moved from its base on neutral prompts: what it may forget, and what can anchor it.

The prompts (neutral.json) ship with lorafit and are of no data set. The base answers them once, greedily, with a few
tokens. The drift is then the divergence KL(base || tuned) of the next token, in nats, and the share of those tokens
that are no longer the most probable ones. The anchors are other prompts: what is trained on is not measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lorafit.data.packing import Pack, TokenRow, build_pack
from lorafit.errors import LorafitError
from lorafit.forward import pack_drift
from lorafit.infer.model import Model
from lorafit.infer.sampling import Sampling
from lorafit.model.llama import Llama
from lorafit.model.lora import evaluating
from lorafit.storage.safe_read import MB, read_json

PROMPTS = Path(__file__).with_name("neutral.json")
TOKENS = 24  # most of an answer of the base
AT_ONCE = 4  # rows of a pass
Texts = dict[str, list[list[list[int]]]]  # by kind: the ids of each prompt, and of the base's answer


@dataclass(frozen=True, slots=True)
class Neutral:
    """The base's answers to neutral prompts: passes to measure, and passes that anchor a training."""

    measured: Sequence[Pack]
    anchors: Sequence[Pack]

    def drift(self, network: Llama) -> tuple[float, float]:
        """(mean divergence in nats, share of greedy tokens that changed) over the tokens of the measured answers."""
        with evaluating(network), torch.inference_mode():
            found = [pack_drift(network, pack) for pack in self.measured]
        divergences, changed = (np.concatenate(each) for each in zip(*found, strict=True))
        return float(divergences.mean()), float(changed.mean())

    def anchor(self, step: int) -> Pack:
        """The pass that anchors the step after `step` steps."""
        return self.anchors[step % len(self.anchors)]


def answer_neutral(model: Model) -> Texts:
    """Let the base answer the neutral prompts. One that the model cannot read is left out."""
    prompts: Mapping[str, Sequence[str]] = json.loads(PROMPTS.read_text(encoding="utf-8"))
    return {kind: _answers(model, texts) for kind, texts in prompts.items()}


def _answers(model: Model, texts: Sequence[str]) -> list[list[list[int]]]:
    prompts: list[list[int]] = []
    for text in texts:
        try:
            ids = model.prompt_ids(text)
        except LorafitError:
            continue
        if len(ids) + TOKENS < model.network.arch.max_position_embeddings:
            prompts.append(ids)
    answers: list[list[int]] = [[] for _ in prompts]
    requests = [model.request(ids, TOKENS, Sampling()) for ids in prompts]
    for index, token in model.tokens(requests, base=True):
        answers[index].append(token.id)
    return [[prompt, answer] for prompt, answer in zip(prompts, answers, strict=True) if answer]


def read_answers(path: Path, vocab_size: int) -> Texts | None:
    """The answers that a run stored; None where there are none that a model of this vocabulary can read."""
    try:
        stored = read_json(path, MB)
        texts = {
            kind: [[list(ids) for ids in pair] for pair in stored[kind]] for kind in ("measured", "anchors")
        }
        for pairs in texts.values():
            for prompt, answer in pairs:
                if not prompt or not 0 < len(answer) <= TOKENS or len(prompt) > 4096:
                    return None
                if not all(type(token) is int and 0 <= token < vocab_size for token in (*prompt, *answer)):
                    return None
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return texts


def neutral_packs(texts: Texts) -> Neutral:
    """The passes of the base's answers."""
    return Neutral(_packs(texts["measured"]), _packs(texts["anchors"]))


def _packs(pairs: Sequence[Sequence[Sequence[int]]]) -> list[Pack]:
    rows: list[TokenRow] = [
        (np.array([*prompt, *answer]), np.repeat([False, True], [len(prompt), len(answer)]))
        for prompt, answer in pairs
    ]
    # every pass has prompts of the whole list, which begins in one language and ends in another
    count = -(-len(rows) // AT_ONCE)
    return [build_pack(rows[first::count]) for first in range(count)]
