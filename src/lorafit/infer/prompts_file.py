"""Reads prompts from a file: texts, or rows with `messages`, or a question by any usual name. All problems at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lorafit.data.columns import question_columns
from lorafit.data.folders import data_files
from lorafit.data.formats import Chat, Fields, Instruction, question, undecodable
from lorafit.data.readers import place_of, read_file
from lorafit.data.row_faults import RowFaults
from lorafit.errors import DataError, LorafitError, Problem
from lorafit.infer.model import Model, Question
from lorafit.storage.safe_read import MB, read_text

T = TypeVar("T")
MAX_TEXT = 256 * MB  # of a file with one prompt per line
_KINDS = ("messages", "prompt", "instruction")
_HINT = 'write {"prompt": "..."}, {"messages": [...]} or {"instruction": "...", "input": "..."}'


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One row of a file: its value as it was read, and the ids of its prompt."""

    raw: object
    ids: list[int]


def read_prompts(path: Path, model: Model) -> list[PromptRow]:
    """The rows of a file as prompts for `model`. Other fields of a row are kept.

    Raises DataError with the problems of all rows.
    """
    return read_rows(
        path, lambda raw: PromptRow(raw, model.prompt_ids(question_of(raw))), "there is no prompt"
    )


def read_rows(path: Path, read: Callable[[object], T], if_empty: str) -> list[T]:
    """What `read` makes of each row of a file.

    Raises DataError with the problems of all rows, each with its places, or with `if_empty` for a file without rows.
    """
    faults, rows = RowFaults(), list[T]()
    for name, number, place, raw in _raw_rows(path):
        try:
            if isinstance(raw, Problem):
                raise DataError.of([raw])
            rows.append(read(raw))
        except LorafitError as error:
            for problem in error.problems:
                faults.add(name, number, place, dataclasses.replace(problem, place=place))
    if faults:
        raise DataError.of(faults.problems(0), faults.num_more)
    if not rows:
        raise DataError(if_empty, place=str(path))
    return rows


def _raw_rows(path: Path) -> Iterator[tuple[str, int, str, object]]:
    """(file, number, place, value) of each row, a Problem for a line that is none.

    A .txt file has one prompt per line; all other files are read as training rows are. Raises DataError where the file
    cannot be read.
    """
    if path.suffix.lower() != ".txt" or not path.exists():
        for file in data_files(path):
            for row in read_file(file, file.name):
                place = row.value.place if isinstance(row.value, Problem) else ""
                place = place or place_of(file.name, row.number, row.line)
                yield file.name, row.number, place, row.value
        return
    try:
        text = read_text(path, MAX_TEXT).removeprefix("\ufeff")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read: {error}", place=str(path)) from None
    lines = [(line, prompt) for line, prompt in enumerate(text.split("\n"), 1) if prompt.strip()]
    for number, (line, prompt) in enumerate(lines, 1):
        yield path.name, number, place_of(path.name, number, line), prompt.rstrip("\r")


def question_of(raw: object) -> Question:
    """The question of a row. Raises DataError."""
    if isinstance(raw, str):
        return _text(raw, "the prompt")
    if not isinstance(raw, dict):
        raise DataError("the row is neither a text nor an object", hint=_HINT)
    kinds = [kind for kind in _KINDS if raw.get(kind) is not None]
    if not kinds and (columns := question_columns(raw)):
        values = {name: raw.get(column) for name, column in columns.items()}
        return question_of({**values, "system": raw.get("system")})
    if len(kinds) != 1:
        has = f"has {' and '.join(f'`{kind}`' for kind in kinds)}" if kinds else "has none of them"
        raise DataError(
            f"the row must have one of `messages`, `prompt` and `instruction`, and {has}", hint=_HINT
        )
    match kinds[0]:
        case "messages":
            return _conversation(raw)
        case "prompt":
            return _text(raw["prompt"], "`prompt`")
        case _:
            extra, system = (_text(raw.get(key) or "", f"`{key}`") for key in ("input", "system"))
            return Instruction(_text(raw["instruction"], "`instruction`"), extra, "", system)


def _conversation(raw: dict[str, object]) -> Chat:
    if not isinstance(raw["messages"], list) or not raw["messages"]:
        raise DataError("`messages` is not a list of turns", hint=_HINT)
    problems: list[Problem] = []
    chat = question(Fields(raw, "the row", problems))
    if problems:
        raise DataError.of(problems)
    if chat.messages[-1].role not in ("user", "tool"):
        raise DataError("`messages` does not end in a user turn", hint="remove the answer from the row")
    return chat


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} is not text")
    if fault := undecodable(value):
        raise DataError(f"{name} contains {fault}")
    return value
