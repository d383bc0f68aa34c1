"""Chooses the next token from logits: greedy, temperature, top-k and top-p. Each row has its own random stream."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy, and ignores the other fields.

    `top_k` 0 and `top_p` 1 keep all tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def stream(self, row: int) -> torch.Generator:
        """The random generator of one row, so that its answer does not depend on its neighbours."""
        seed = np.random.SeedSequence([self.seed, row]).generate_state(1)[0]
        return torch.Generator().manual_seed(int(seed))


def next_tokens(logits: Tensor, sampling: Sampling, streams: list[torch.Generator]) -> list[int]:
    """The next token of each row of `logits` (rows, vocab_size). `streams` has one generator per row."""
    if sampling.temperature == 0:
        chosen: list[int] = logits.argmax(-1).tolist()
        return chosen
    scores = logits.double().cpu()
    scores = (scores - scores.amax(-1, keepdim=True)) / sampling.temperature  # finite at any temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        best = scores.topk(sampling.top_k, dim=-1)  # exactly that many, also where scores are equal
        scores = torch.full_like(scores, -torch.inf).scatter_(-1, best.indices, best.values)
    probabilities = scores.softmax(-1)
    if sampling.top_p < 1:
        ordered, index = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # probability of the tokens that come before
        beyond = before >= sampling.top_p
        beyond[:, 0] = False  # the most probable token always stays
        ordered = ordered.masked_fill(beyond, 0.0)
        probabilities = torch.zeros_like(ordered).scatter_(-1, index, ordered)
    return [
        int(torch.multinomial(row, 1, generator=stream))
        for row, stream in zip(probabilities, streams, strict=True)
    ]
