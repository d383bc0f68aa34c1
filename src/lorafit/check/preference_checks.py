"""Findings in preferences: equal answers, contradictory pairs, longer winners, and prompts of held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from lorafit.check.text_checks import Finding
from lorafit.data.content import Content, Preference
from lorafit.data.formats import Row


@dataclass
class PairFindings:
    """`num_pairs` rows have two answers; in `num_uneven` one is longer, in `num_longer` the chosen one.

    `equal`: both answers are one. `contradictory`: an earlier row prefers the other of the same two answers. `leaked`:
    the prompt of a held-out row is trained too, with other answers.
    """

    num_pairs: int = 0
    num_uneven: int = 0
    num_longer: int = 0
    equal: Finding = field(default_factory=Finding)
    contradictory: Finding = field(default_factory=Finding)
    leaked: Finding = field(default_factory=Finding)


class Pairs(PairFindings):
    """Reads rows and collects the findings."""

    def __init__(self) -> None:
        super().__init__()
        self._prompts: list[tuple[int, bytes]] = []
        self._orders: dict[bytes, bytes] = {}  # of two answers to a prompt, the chosen one that came first

    def add(self, rows: Sequence[Row]) -> None:
        """Read the preferences among `rows`."""
        for row in rows:
            if not isinstance(row.content, Preference):
                continue
            prompt = _hash(_prompt(row.content.preferred))
            self._prompts.append((row.number, prompt))
            if row.content.chosen is None or row.content.rejected is None:
                continue
            chosen, rejected = (
                "\0".join(side.answers()).strip() for side in (row.content.chosen, row.content.rejected)
            )
            self.num_pairs += 1
            self.num_uneven += len(chosen) != len(rejected)
            self.num_longer += len(chosen) > len(rejected)
            if chosen == rejected:
                self.equal.add(row.number, chosen[:40])
                continue
            one, other = _hash(chosen), _hash(rejected)
            if self._orders.setdefault(prompt + min(one, other) + max(one, other), one) != one:
                self.contradictory.add(row.number)

    def finish(self, held_out: NDArray[np.int64]) -> PairFindings:
        """The findings; `held_out` are the numbers of the held-out rows."""
        held = set(held_out.tolist())
        trained = {prompt for number, prompt in self._prompts if number not in held}
        for number, prompt in self._prompts:
            if number in held and prompt in trained:
                self.leaked.add(number)
        names = PairFindings.__dataclass_fields__
        return PairFindings(**{name: getattr(self, name) for name in names})


def _prompt(content: Content) -> str:
    """Every text of a row but its answers."""
    answers = set(content.answers())
    return "\0".join(text for text in content.texts() if text not in answers)


def _hash(text: str) -> bytes:
    return blake2b(" ".join(text.split()).encode("utf-8", "surrogatepass"), digest_size=8).digest()
