"""Sample generations: the base and the tuned model answer held-out prompts while a run trains, and at its end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lorafit.data.formats import Row
from lorafit.infer.model import Answer, Model
from lorafit.model.memory import is_out_of_memory
from lorafit.observe.events import Answers, Message, Observer, Progress, Sample

SAMPLE_TOKENS = 128  # most tokens of an answer


class SampleGenerator:
    """Answers the same prompts each time, with the base only once. Weights and random state stay as they are."""

    def __init__(self, model: Model, rows: Sequence[Row], observe: Observer) -> None:
        self._model, self._observe = model, observe
        self._prompts = [(row.place, row.content) for row in rows if row.content.asks]
        self._base: list[Answer] | None = None
        self._is_disabled = False  # memory was exhausted

    def __call__(self, step: int) -> None:
        """Answer after `step`. When memory is exhausted, a warning is shown once, and the run continues."""
        if not self._prompts or self._is_disabled:
            return
        started = time.perf_counter()
        try:
            is_first, base = self._base is None, self._base_answers()
            tuned = self._answer("answering held-out prompts", base=False)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._is_disabled = True
            self._observe(Message("no memory to answer held-out prompts: not tried again", "warning"))
            return
        self._observe(
            Answers(
                step,
                prompts=[content.question() for _, content in self._prompts],
                tuned=[answer.text for answer in tuned],
                stopped=[answer.stopped for answer in tuned],
                base=[answer.text for answer in base] if is_first else None,
                seconds=round(time.perf_counter() - started, 4),
            )
        )

    def generate_samples(self) -> list[dict[str, Any]]:
        """The answers of the final adapter, shown beside those of the base. Returns the content of samples.json."""
        if not self._prompts:
            return []
        base, tuned = self._base_answers(), self._answer("answering held-out prompts", base=False)
        samples = []
        for (place, content), before, after in zip(self._prompts, base, tuned, strict=True):
            self._observe(Sample(content.question(), before.text, after.text))
            texts = {"place": place, "prompt": content.question(), "answer": content.answers()[-1]}
            samples.append({**texts, "base": asdict(before), "tuned": asdict(after)})
        return samples

    def _base_answers(self) -> list[Answer]:
        if self._base is None:
            self._base = self._answer("answering held-out prompts with the base model", base=True)
        return self._base

    def _answer(self, activity: str, *, base: bool) -> list[Answer]:
        self._observe(Progress(activity, 0, 1))
        questions = [content for _, content in self._prompts]
        return self._model.generate(questions, max_tokens=SAMPLE_TOKENS, base=base)
