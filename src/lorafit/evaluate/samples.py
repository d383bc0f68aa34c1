"""Fixed held-out prompts, answered by base and tuned model while a run trains and at its end."""

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
    """Asks the same prompts again and again, the base once; no weight and no random state changes by it."""

    def __init__(self, model: Model, rows: Sequence[Row], observe: Observer) -> None:
        self._model, self._observe = model, observe
        self._asked = [(row.place, row.content) for row in rows if row.content.asks]
        self._base: list[Answer] | None = None
        self._is_silent = False  # memory ran out

    def __call__(self, step: int) -> None:
        """Answer after `step`; where memory runs out that is said once, and the run goes on."""
        if not self._asked or self._is_silent:
            return
        started = time.perf_counter()
        try:
            first, base = self._base is None, self._base_answers()
            tuned = self._answer("answering held-out prompts", base=False)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._is_silent = True
            self._observe(Message("no memory to answer held-out prompts: not tried again", "warning"))
            return
        self._observe(
            Answers(
                step,
                prompts=[content.question() for _, content in self._asked],
                tuned=[answer.text for answer in tuned],
                stopped=[answer.stopped for answer in tuned],
                base=[answer.text for answer in base] if first else None,
                seconds=round(time.perf_counter() - started, 4),
            )
        )

    def finish(self) -> list[dict[str, Any]]:
        """The last answers, shown side by side with the base's; returns what samples.json holds."""
        if not self._asked:
            return []
        base, tuned = self._base_answers(), self._answer("answering held-out prompts", base=False)
        samples = []
        for (place, content), before, after in zip(self._asked, base, tuned, strict=True):
            self._observe(Sample(content.question(), before.text, after.text))
            texts = {"place": place, "prompt": content.question(), "answer": content.answers()[-1]}
            samples.append({**texts, "base": asdict(before), "tuned": asdict(after)})
        return samples

    def _base_answers(self) -> list[Answer]:
        if self._base is None:
            self._base = self._answer("answering held-out prompts as the base", base=True)
        return self._base

    def _answer(self, what: str, *, base: bool) -> list[Answer]:
        self._observe(Progress(what, 0, 1))
        questions = [content for _, content in self._asked]
        return self._model.generate(questions, max_tokens=SAMPLE_TOKENS, base=base)
