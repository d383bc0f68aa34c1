"""Sample generations: the base and the tuned model answer held-out prompts while a run trains, and at its end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorafit.data.content import Chat, Content
from lorafit.data.formats import Row
from lorafit.infer.model import Answer, Model, Question
from lorafit.infer.prompts_file import question_of, read_rows
from lorafit.model.memory import is_out_of_memory
from lorafit.observe.events import Answers, Message, Observer, Progress, Sample

SAMPLE_TOKENS = 128  # most tokens of an answer


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question to answer: its place, its text for people, and the right answer ("" if it is not known)."""

    place: str
    question: Question
    text: str
    answer: str
    is_row: bool

    @classmethod
    def of_row(cls, row: Row) -> Prompt:
        """The question of a row."""
        return cls(row.place, row.content, row.content.question(), row.content.answers()[-1], True)

    @classmethod
    def of_file(cls, name: str, raw: object) -> Prompt:
        """A row of a file of prompts. Raises DataError."""
        question = question_of(raw)
        last = question.messages[-1].content if isinstance(question, Chat) else question
        text = last.question() if isinstance(last, Content) else str(last)
        return cls(name, question, text, "", False)


def prompts_of(rows: Sequence[Row], file: Path | None) -> list[Prompt]:
    """The prompts of `file`, then those of `rows` that have a question.

    Raises DataError with the problems of all rows of the file.
    """
    own = read_rows(file, lambda raw: Prompt.of_file(file.name, raw), "there is no prompt") if file else []
    return [*own, *(Prompt.of_row(row) for row in rows if row.content.asks)]


class SampleGenerator:
    """Answers the same prompts each time, with the base only once. Weights and random state stay as they are."""

    def __init__(self, model: Model, prompts: Sequence[Prompt], observe: Observer) -> None:
        self._model, self._observe, self._prompts = model, observe, prompts
        self._base: list[Answer] | None = None
        self._is_disabled = False  # memory was exhausted

    def __call__(self, step: int) -> None:
        """Answer after `step`. When memory is exhausted, a warning is shown once, and the run continues."""
        started, is_first = time.perf_counter(), self._base is None
        if (answers := self._both()) is None:
            return
        base, tuned = answers
        self._observe(
            Answers(
                step,
                prompts=[prompt.text for prompt in self._prompts],
                tuned=[answer.text for answer in tuned],
                stopped=[answer.stopped for answer in tuned],
                base=[answer.text for answer in base] if is_first else None,
                seconds=round(time.perf_counter() - started, 4),
            )
        )

    def generate_samples(self, *, trained: bool) -> list[dict[str, Any]]:
        """The answers of the final adapter, shown beside those of the base. Returns the content of samples.json,
        empty where memory is exhausted.

        `trained` is whether the rows of these prompts were trained.
        """
        if (answers := self._both()) is None:
            return []
        base, tuned = answers
        if trained and any(prompt.is_row for prompt in self._prompts):
            self._observe(Message("no row was left untrained: the prompts below are of trained rows"))
        samples = []
        for prompt, before, after in zip(self._prompts, base, tuned, strict=True):
            self._observe(Sample(prompt.text, before.text, after.text))
            texts: dict[str, Any] = {"place": prompt.place, "prompt": prompt.text, "answer": prompt.answer}
            texts |= {"trained": True} if trained and prompt.is_row else {}
            samples.append({**texts, "base": asdict(before), "tuned": asdict(after)})
        return samples

    def _both(self) -> tuple[list[Answer], list[Answer]] | None:
        """The answers of the base and of the tuned model, None without prompts or memory."""
        if not self._prompts or self._is_disabled:
            return None
        try:
            return self._base_answers(), self._answer("answering prompts", base=False)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        self._is_disabled = True
        self._observe(Message("no memory to answer prompts: not tried again", "warning"))
        return None

    def tuned(self) -> list[Answer]:
        """The answers of the adapter that the network has now."""
        return self._answer("answering prompts", base=False)

    def _base_answers(self) -> list[Answer]:
        if self._base is None:
            self._base = self._answer("answering prompts with the base model", base=True)
        return self._base

    def _answer(self, activity: str, *, base: bool) -> list[Answer]:
        self._observe(Progress(activity, 0, 1))
        questions = [prompt.question for prompt in self._prompts]
        return self._model.generate(questions, max_tokens=SAMPLE_TOKENS, base=base)
