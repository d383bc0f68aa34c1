"""A conversation with a model: what has been said, and how much of it still fits. It draws nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorafit.data.formats import Message
from lorafit.errors import ModelError
from lorafit.infer.model import Model


@dataclass(frozen=True, slots=True)
class Asked:
    """A question as the model is to read it, and how many of the oldest turns had to be left out for it."""

    messages: tuple[Message, ...]
    num_dropped: int


class Conversation:
    """Turns so far. `system` is the system prompt, None for the prompt contract's own.

    A prompt contract of single instructions (`remembers` is False) asks each question by itself.
    """

    def __init__(self, model: Model, max_tokens: int, system: str | None = None) -> None:
        self.system = system
        self.turns: list[Message] = []
        self.remembers = model.renderer.contract.template == "chat"
        self._model = model
        self._limit = model.network.arch.max_position_embeddings
        self._room = min(max_tokens, self._limit // 4)

    def ask(self, text: str) -> Asked:
        """What to ask next. The oldest turns are left out, for good, where no room would be left for an answer.

        Raises ModelError where the question alone does not fit, DataError where it cannot be rendered; the
        conversation is then as it was.
        """
        turns = [*(self.turns if self.remembers else []), Message("user", text)]
        num_dropped = 0
        while (length := self._length(turns)) + self._room > self._limit and len(turns) > 1:
            turns = turns[2:]
            num_dropped += 1
        if length >= self._limit:
            raise ModelError(
                f"the question has {length:,} tokens, the model reads at most {self._limit - 1:,}",
                hint="ask it shorter",
            )
        self.turns = turns[:-1]
        return Asked(self._with_system(turns), num_dropped)

    def answered(self, asked: Asked, answer: str) -> None:
        """Remember the answer to what `ask` gave; an empty one leaves no trace of the question."""
        if answer:
            self.turns += [asked.messages[-1], Message("assistant", answer)]

    def reset(self) -> None:
        """Forget all turns; the system prompt stays."""
        self.turns = []

    def _with_system(self, turns: Sequence[Message]) -> tuple[Message, ...]:
        return (*([Message("system", self.system)] if self.system else []), *turns)

    def _length(self, turns: Sequence[Message]) -> int:
        return len(self._model.renderer.prompt_ids(self._with_system(turns)))
