"""From logits to the next token: greedy, temperature, top-k and top-p, each row with its own random stream."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy, and then nothing else matters.

    `top_k` 0 and `top_p` 1 keep every token.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def streams(self, num_rows: int) -> list[torch.Generator]:
        """One generator a row, so that a row's answer does not depend on its neighbours."""
        return [self.stream(row) for row in range(num_rows)]

    def stream(self, row: int) -> torch.Generator:
        """The generator of one row."""
        seed = np.random.SeedSequence([self.seed, row]).generate_state(1)[0]
        return torch.Generator().manual_seed(int(seed))


def next_tokens(logits: Tensor, sampling: Sampling, streams: list[torch.Generator]) -> list[int]:
    """The next token of each row of `logits` (rows, vocab_size); `streams` is one generator a row."""
    if sampling.temperature == 0:
        chosen: list[int] = logits.argmax(-1).tolist()
        return chosen
    scores = logits.double().cpu()
    scores = (scores - scores.amax(-1, keepdim=True)) / sampling.temperature  # finite at any temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        likeliest = scores.topk(sampling.top_k, dim=-1)  # exactly so many, also where scores are equal
        scores = torch.full_like(scores, -torch.inf).scatter_(-1, likeliest.indices, likeliest.values)
    probabilities = scores.softmax(-1)
    if sampling.top_p < 1:
        ordered, index = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # mass of the tokens that are more likely
        beyond = before >= sampling.top_p
        beyond[:, 0] = False  # the likeliest stays, whatever the share
        ordered = ordered.masked_fill(beyond, 0.0)
        probabilities = torch.zeros_like(ordered).scatter_(-1, index, ordered)
    return [
        int(torch.multinomial(row, 1, generator=stream))
        for row, stream in zip(probabilities, streams, strict=True)
    ]
