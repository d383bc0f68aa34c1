"""Tasks with a right answer, from a JSONL file: a prompt a line, and the answer or a pattern that the answer fits.

    {"prompt": "What is 2 + 3?", "answer": "5"}
    {"prompt": "Name a colour.", "answer": ["red", "green", "blue"]}
    {"prompt": "When did it end?", "pattern": "\\\\b1945\\\\b", "system": "Answer in one sentence."}

`answer` is right when the model says exactly that, white space at both ends aside; `pattern` is a regular expression
of Python that is found somewhere in what it says. `instruction` and `input` may stand for `prompt`. A file that ends in
.json holds a list of such objects.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.data.formats import Instruction
from lorafit.errors import DataError, Problem, Problems
from lorafit.infer.model import Model
from lorafit.storage.safe_read import MB, read_text

MAX_FILE = 256 * MB
_KEYS = {"prompt", "instruction", "input", "answer", "pattern", "system"}


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt and what is right: any of `answers`, or what `pattern` is found in."""

    prompt: Instruction
    answers: tuple[str, ...]
    pattern: re.Pattern[str] | None

    def is_right(self, said: str) -> bool:
        """Whether `said` answers it."""
        if self.pattern is not None:
            return self.pattern.search(said) is not None
        return said.strip() in self.answers


@dataclass(frozen=True, slots=True)
class Score:
    """How many of the tasks of a file were answered right, and how many answers ended by themselves."""

    right: int
    ended: int
    total: int


def read_tasks(path: Path) -> list[Task]:
    """The tasks of a file. Raises DataError naming every line that is none."""
    problems, tasks = Problems(), []
    for place, value in _objects(path, problems):
        try:
            tasks.append(_task(value))
        except ValueError as error:
            problems.add([Problem(str(error), place)])
    if problems:
        raise DataError.of(problems.kept, problems.num_more)
    if not tasks:
        raise DataError("there is no task in the file", place=str(path))
    return tasks


def score(model: Model, tasks: Sequence[Task], *, max_tokens: int, base: bool = False) -> Score:
    """Ask greedily and count."""
    answers = model.generate([task.prompt for task in tasks], max_tokens=max_tokens, base=base)
    right = sum(task.is_right(answer.text) for task, answer in zip(tasks, answers, strict=True))
    return Score(right, sum(answer.stopped for answer in answers), len(tasks))


def _objects(path: Path, problems: Problems) -> Iterator[tuple[str, Any]]:
    """(place, value) of each task."""
    try:
        text = read_text(path, MAX_FILE)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the tasks cannot be read: {error}", place=str(path)) from None
    lines = enumerate(text.splitlines(), 1)
    if path.suffix == ".json":
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"is not JSON: {error}", place=str(path)) from None
        if not isinstance(values, list):
            raise DataError("is no list of tasks", place=str(path))
        yield from ((f"{path} task {number}", value) for number, value in enumerate(values, 1))
        return
    for number, line in lines:
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.add([Problem(f"is not JSON: {error}", f"{path}:{number}")])


def _task(value: Any) -> Task:
    """A task of its object. Raises ValueError."""
    if not isinstance(value, dict):
        raise ValueError("a task is an object with `prompt`, and `answer` or `pattern`")
    if strange := sorted(value.keys() - _KEYS):
        raise ValueError(f"a task has no `{strange[0]}`; its keys are {', '.join(sorted(_KEYS))}")
    prompt = value.get("prompt", value.get("instruction"))
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("`prompt` is missing or empty")
    texts = {key: value.get(key, "") for key in ("input", "system")}
    for key, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"`{key}` is no text")
    if ("answer" in value) == ("pattern" in value):
        raise ValueError("a task has either `answer` or `pattern`")
    asked = Instruction(prompt, texts["input"], "", texts["system"])
    if "pattern" in value:
        try:
            return Task(asked, (), re.compile(value["pattern"]))
        except (re.error, TypeError) as error:
            raise ValueError(f"`pattern` is no regular expression: {error}") from None
    answers = value["answer"] if isinstance(value["answer"], list) else [value["answer"]]
    if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise ValueError("`answer` is no text, and no list of texts")
    return Task(asked, tuple(answer.strip() for answer in answers), None)
