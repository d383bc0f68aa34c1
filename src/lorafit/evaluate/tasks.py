"""Tasks with a known answer, read from a file: one prompt per row, with the answer or a pattern that it must match.

    {"prompt": "What is 2 + 3?", "answer": "5"}
    {"prompt": "Name a colour.", "answer": ["red", "green", "blue"]}
    {"prompt": "When did it end?", "pattern": "\\\\b1945\\\\b", "system": "Answer in one sentence."}

With `answer`, the model's answer must be equal to it, without white space at both ends. `pattern` is a regular
expression of Python that must match somewhere in the model's answer. `instruction` and `input`, or another usual name
of a question, can replace `prompt`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorafit.data.columns import question_columns
from lorafit.errors import DataError
from lorafit.infer.model import Model, Question
from lorafit.infer.prompts_file import question_of, read_rows

_KEYS = {"prompt", "instruction", "input", "answer", "pattern", "system"}


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt and its correct answers: any of `answers`, or all that `pattern` matches."""

    prompt: Question
    answers: tuple[str, ...]
    pattern: re.Pattern[str] | None

    def is_right(self, answer: str) -> bool:
        """Whether `answer` is correct."""
        if self.pattern is not None:
            return self.pattern.search(answer) is not None
        return answer.strip() in self.answers


@dataclass(frozen=True, slots=True)
class Score:
    """Correct answers to the tasks of a file, and answers that ended with a stop token."""

    right: int
    ended: int
    total: int


def read_tasks(path: Path) -> list[Task]:
    """The tasks of a file. Raises DataError with the problems of all rows."""
    return read_rows(path, _task, "there is no task in the file")


def score(model: Model, tasks: Sequence[Task], *, max_tokens: int, base: bool = False) -> Score:
    """Answer greedily and count the correct answers."""
    answers = model.generate([task.prompt for task in tasks], max_tokens=max_tokens, base=base)
    right = sum(task.is_right(answer.text) for task, answer in zip(tasks, answers, strict=True))
    return Score(right, sum(answer.stopped for answer in answers), len(tasks))


def _task(raw: object) -> Task:
    """The task of a row. Raises DataError."""
    if not isinstance(raw, dict):
        raise DataError("a task is an object with `prompt`, and `answer` or `pattern`")
    columns = question_columns(raw)
    if unknown := sorted(raw.keys() - _KEYS - set(columns.values())):
        raise DataError(f"a task has no `{unknown[0]}`; its keys are {', '.join(sorted(_KEYS))}")
    prompt = raw.get(columns.get("instruction", "prompt"))
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError("`prompt` is missing or empty")
    extra = raw.get(columns.get("input", "input"))
    question = question_of({"instruction": prompt, "input": extra, "system": raw.get("system")})
    if ("answer" in raw) == ("pattern" in raw):
        raise DataError("a task has either `answer` or `pattern`")
    if "pattern" in raw:
        try:
            return Task(question, (), re.compile(raw["pattern"]))
        except (re.error, TypeError) as error:
            raise DataError(f"`pattern` is not a regular expression: {error}") from None
    answers = raw["answer"] if isinstance(raw["answer"], list) else [raw["answer"]]
    if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise DataError("`answer` is neither a text nor a list of texts")
    return Task(question, tuple(answer.strip() for answer in answers), None)
