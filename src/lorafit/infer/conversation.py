"""A conversation with a model: its turns, and how many of them fit the context. It prints nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorafit.data.contract import RAW
from lorafit.data.formats import Message
from lorafit.errors import ModelError
from lorafit.infer.model import Model


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """The turns to answer, and how many of the oldest turns were dropped to make room."""

    messages: tuple[Message, ...]
    num_dropped: int


class Conversation:
    """The turns so far. `system` is the system prompt, None for that of the prompt contract.

    With a prompt contract for single instructions, `remembers` is False: each question is a prompt of its own.
    """

    def __init__(self, model: Model, max_tokens: int, system: str | None = None) -> None:
        self.system = system
        self.turns: list[Message] = []
        self.remembers = model.renderer.contract.template == "chat"
        self._model = model
        self._limit = model.network.arch.max_position_embeddings
        self._room = min(max_tokens, self._limit // 4)

    def ask(self, text: str) -> ChatPrompt:
        """The next prompt. The oldest turns are dropped, permanently, where they leave no room for an answer.

        Raises ModelError where the question alone does not fit, DataError where it cannot be rendered. The
        conversation does not change then.
        """
        turns = [*(self.turns if self.remembers else []), Message("user", text)]
        num_dropped = 0
        while (length := self._length(turns)) + self._room > self._limit and len(turns) > 1:
            turns = turns[2:]
            num_dropped += 1
        if length >= self._limit:
            raise ModelError(
                f"the question has {length:,} tokens, the model reads at most {self._limit - 1:,}",
                hint="write a shorter question",
            )
        self.turns = turns[:-1]
        return ChatPrompt(self._with_system(turns), num_dropped)

    @property
    def note(self) -> str:
        """Why each question is a prompt of its own, "" where it is not."""
        if self.remembers:
            return ""
        template = self._model.renderer.contract.template
        why = f"the {template} template knows no conversations"
        if template == RAW:
            why = "the rows of the training had no template"
        return f"{why}: each question is a prompt of its own"

    def answered(self, prompt: ChatPrompt, answer: str) -> None:
        """Add a question and its answer to the turns; with an empty answer, nothing is added."""
        if answer:
            self.turns += [prompt.messages[-1], Message("assistant", answer)]

    def reset(self) -> None:
        """Remove all turns. The system prompt stays."""
        self.turns = []

    def _with_system(self, turns: Sequence[Message]) -> tuple[Message, ...]:
        return (*([Message("system", self.system)] if self.system else []), *turns)

    def _length(self, turns: Sequence[Message]) -> int:
        return len(self._model.renderer.prompt_ids(self._with_system(turns)))
