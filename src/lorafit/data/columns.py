"""From the columns of any table to the fields of a format: by `data.columns`, or by the names that data sets use.

A column that is no field stays in the row under its own name, so that what is not used can be counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from lorafit.data.formats import detect
from lorafit.data.row_fields import CONVERSATIONS, SYSTEM
from lorafit.data.strict_json import RepeatedKeyError, parse_strict
from lorafit.errors import DataError
from lorafit.redact import json_line, shell

Columns = Mapping[str, str]  # field -> column; `answers.text.0` is a value within a value
TEXT_FIELDS = ("instruction", "input", "output", "system", "prompt", "completion", "text")
FIELDS = (
    *(*TEXT_FIELDS, "messages", "conversations", "tools", "history", "weight", "train"),
    *("chosen", "rejected", "label"),
)
LISTS = {"messages", "conversations", "conversation", "tools"}  # may be the JSON text of a list

# The names of columns for each field, the usual ones first. A context is the question where there is no other.
_QUESTIONS = ("instruction", "question", "query", "problem", "prompt", "inputs")
_CONTEXTS = ("input", "context", "passage", "document", "article", "dialogue", "dialog")
_ANSWERS = (
    "output", "outputs", "response", "answer", "answers", "completion", "solution", "summary", "highlights", "target",
    "targets",
)  # fmt: skip
_SPEAKERS = (("human", "user"), ("assistant", "bot", "gpt"))  # question and answer where no other names are
_CHOICES = ("choices", "options")  # the answer may be the number of one
_NAMES = {  # the data sets that brought a layout into use, by its columns
    ("instruction", "context", "response"): "Dolly",
    ("question", "answer"): "GSM8K",
    ("query", "response"): "MetaMath",
    ("system_prompt", "question", "response"): "OpenOrca",
    ("question", "context", "answers"): "SQuAD",
    ("document", "summary"): "XSum",
}
_ANY = "COLUMN"


@dataclass(frozen=True, slots=True)
class Layout:
    """The format of a table, the reason for it as a sentence for the user, and the columns of its fields."""

    format: str
    reason: str
    columns: Columns = field(default_factory=dict)


def find_layout(head: Sequence[object], format: str = "auto", columns: Columns | None = None) -> Layout:  # noqa: A002
    """The layout of a table whose first rows are `head`, for the wanted `format` and `data.columns`.

    Raises DataError for a table that fits no format, or can be read in several ways.
    """
    rows = [row for row in head if isinstance(row, dict)]
    if columns:
        return _given(rows, head, format, columns)
    if format not in ("auto", "alpaca"):
        return Layout(format, "given")
    found = (_conversation(rows) if format == "auto" else None) or _pair(rows, is_given=format != "auto")
    if found is not None and 2 * sum(_fits(row, found.columns) for row in rows) >= len(head):
        return found
    if format != "auto":
        return Layout(format, "given")
    _refuse_preferences(rows)
    try:
        detected = detect(head)
    except DataError as error:
        if (in_capitals := _in_capitals(rows)) is not None:
            return in_capitals
        raise _no_format(rows, error) from error
    return Layout(detected.format, detected.reason)


def mapped(raw: object, columns: Columns) -> object:
    """A row with the fields that `columns` give it, missing values as None, and numbers in text fields as text."""
    if not isinstance(raw, dict):
        return raw
    row: dict[str, Any] = raw
    if columns:
        used = {_top(raw, path) for path in columns.values()}
        row = {name: value for name, path in columns.items() if (value := _value(raw, path)) is not _MISSING}
        row |= {(key if key not in row else f"column {key}"): raw[key] for key in raw if key not in used}
    if LISTS.isdisjoint(row) and all(type(value) is str for value in row.values()):
        return row
    row = {key: _usual(key, value) for key, value in row.items()}
    if "messages" in columns:
        row["messages"] = _as_turns(row.get("messages"))
    return row


def _by_plain_name(columns: Iterable[str]) -> dict[str, str]:
    """The columns by their names in lower case, with `_` for a blank."""
    return {column.strip().casefold().replace(" ", "_"): column for column in columns}


def question_columns(row: Mapping[str, object]) -> Columns:
    """The columns of the question of a row without its answer; {} where there is none, or several are possible."""
    names = _by_plain_name(name for name, value in row.items() if value is not None)
    questions, contexts = (
        [names[name] for name in known if name in names] for known in (_QUESTIONS, _CONTEXTS)
    )
    if not questions:
        questions, contexts = contexts or [names[name] for name in _SPEAKERS[0] if name in names], []
    if len(questions) != 1 or len(contexts) > 1:
        return {}
    return {"instruction": questions[0], **({"input": contexts[0]} if contexts else {})}


def is_row(value: Mapping[str, object]) -> bool:
    """Whether an object has the fields of a row."""
    for key in CONVERSATIONS:
        turns = value.get(key)
        if isinstance(turns, list) and any(isinstance(turn, dict) for turn in turns) and not are_turns(turns):
            return False
    try:
        find_layout([value])
    except DataError:
        return {"chosen", "rejected"} <= value.keys()
    return True


def are_turns(value: object) -> bool:
    """Whether a value is the turns of one conversation, and not several rows."""
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        return False
    return all(
        ("role" in turn or "from" in turn or _sides(turn)) and not _holds_turns(turn) for turn in value
    )


def _holds_turns(row: Mapping[str, object]) -> bool:
    return any(isinstance(row.get(key), list) for key in CONVERSATIONS)


_MISSING = object()


def _value(raw: Mapping[str, object], path: str) -> object:
    """The value at `path`: a column, or with dots a value within it, where a number counts from 0 in a list."""
    if path in raw:
        return raw[path]
    value: Any = raw
    for part in path.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return _MISSING if value is raw else None
    return value


def _top(raw: Mapping[str, object], path: str) -> str:
    """The column of `path`."""
    return path if path in raw else path.partition(".")[0]


def _usual(key: str, value: object) -> object:
    """None for NaN; the text of a number in a text field; the list in the JSON text of a conversation."""
    if key in LISTS and isinstance(value, str):
        return _list_in_text(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else value
    if key in TEXT_FIELDS and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value


def _list_in_text(text: str) -> object:
    """The list of which `text` is the JSON, as a CSV file holds it; any other text as it is.

    RepeatedKeyError, which no field takes, where an object in the list has a key twice.
    """
    try:
        value = parse_strict(text) if text.lstrip()[:1] == "[" else text
    except RepeatedKeyError as error:
        return error
    except ValueError:
        return text
    return value if isinstance(value, list) else text


def _fits(row: Mapping[str, object], columns: Columns) -> bool:
    return all(
        _top(row, path) in row
        for name, path in columns.items()
        if name in ("instruction", "output", "messages")
    )


# Conversations whose turns are texts, or pairs of a question and an answer


def _conversation(rows: Sequence[Mapping[str, object]]) -> Layout | None:
    """The layout of rows with one conversation each; None for those that a format reads as they are."""
    for key in CONVERSATIONS:
        values = [value for row in rows if isinstance(value := row.get(key), list) and value]
        if not values or 2 * len(values) < len(rows):
            continue
        shapes = [_shape(value) for value in values]
        if shapes.count("texts") > len(values) // 2:
            how = "LIMA: a list of texts" if key == "conversations" else "a list of texts"
            return Layout("messages", f"`{key}` is {how}, user and assistant in turn", {"messages": key})
        if shapes.count("pairs") > len(values) // 2:
            how = "Capybara: pairs" if key == "conversation" else "pairs"
            question, answer = _sides(values[0][0]) or ("", "")
            return Layout("messages", f"`{key}` is {how} of `{question}` and `{answer}`", {"messages": key})
    return None


def _shape(value: Sequence[object]) -> str:
    if all(isinstance(turn, str) for turn in value):
        return "texts"
    return "pairs" if all(isinstance(turn, dict) and _sides(turn) for turn in value) else "turns"


def _sides(turn: Mapping[str, object]) -> tuple[str, str] | None:
    """The keys of question and answer in a turn that is a pair, None for another turn."""
    names = {key.casefold(): key for key in turn if isinstance(key, str)}
    for known in ((*_QUESTIONS, *_CONTEXTS), _ANSWERS), _SPEAKERS:
        questions, answers = ([names[name] for name in side if name in names] for side in known)
        if len(questions) == len(answers) == 1:
            return questions[0], answers[0]
    return None


def _as_turns(value: object) -> object:
    """A list of texts, or of pairs, as turns with `role` and `content`; any other value as it is."""
    if not isinstance(value, list) or not value or (shape := _shape(value)) == "turns":
        return value
    if shape == "texts":
        texts = value
    else:
        texts = [turn[key] for turn in value for key in _sides(turn) or ()]
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


# Names of fields in capitals


def _in_capitals(rows: Sequence[Mapping[str, object]]) -> Layout | None:
    """The layout of rows that fit a format if `Prompt` is `prompt`, as for all fields; None if they fit none so."""
    names = dict.fromkeys(key for row in rows for key in row)
    fields = {*FIELDS, *CONVERSATIONS}
    columns = {
        name: key for name, key in _by_plain_name(names).items() if name in fields and name not in names
    }
    if not columns:
        return None
    try:
        found = find_layout([mapped(row, columns) for row in rows])
    except DataError:
        return None
    inner = {name: columns.get(path, path) for name, path in found.columns.items()}
    parts = ", ".join(f"{name} is `{path}`" for name, path in columns.items())
    return Layout(found.format, f"by the names of columns: {parts}", {**columns, **inner})


# Tables with a question and an answer


def _pair(rows: Sequence[Mapping[str, object]], *, is_given: bool = False) -> Layout | None:
    """The layout of rows with a question and an answer; None where there is none, or a format reads them as they are.

    Raises DataError where the names allow several readings. `is_given`: the format is given.
    """
    names = _by_plain_name(dict.fromkeys(key for row in rows for key in row))
    if not is_given and any(key in names for key in ("messages", "conversations", "conversation")):
        return None
    if {"prompt", "completion"} <= names.keys() and not is_given:
        return None
    questions, contexts, answers, systems, choices = (
        [names[name] for name in known if name in names]
        for known in (_QUESTIONS, _CONTEXTS, _ANSWERS, SYSTEM, _CHOICES)
    )
    if {"instruction", "output"} <= names.keys():
        questions, answers, choices = [names["instruction"]], [names["output"]], []
        contexts = [names["input"]] if "input" in names else contexts
    if not (questions or contexts or answers):
        questions, answers = ([names[name] for name in known if name in names] for known in _SPEAKERS)
    if not questions:
        questions, contexts = contexts, []
    if not answers or {"chosen", "rejected"} <= names.keys():
        return None
    texts = [names["text"]] if "text" in names and not questions and not is_given else []
    if len(questions) > 1 or len(contexts) > 1 or len(answers) > 1 or texts or (questions and choices):
        raise _ambiguous([*questions, *texts], contexts, choices, answers)
    if not questions or not _is_text(rows, questions[0]):
        return None
    fields = {"instruction": questions[0], "input": contexts[:1], "output": answers[0], "system": systems[:1]}
    found = {
        name: column if isinstance(column, str) else column[0] for name, column in fields.items() if column
    }
    if all(name == column for name, column in found.items()):
        return None  # as it is
    paths = {**found, "output": found["output"] + _path_to_text(rows, found["output"])}
    return Layout("alpaca", _reason(names, found, paths), paths)


def _reason(names: Mapping[str, str], found: Columns, paths: Columns) -> str:
    used = {name for name, column in names.items() if column in found.values()}
    known = next((title for columns, title in _NAMES.items() if set(columns) == used), "")
    parts = ", ".join(f"{name} is `{path}`" for name, path in paths.items())
    return f"{known} layout: {parts}" if known else f"by the names of columns: {parts}"


def _is_text(rows: Sequence[Mapping[str, object]], column: str) -> bool:
    return not any(isinstance(row.get(column), list | dict) for row in rows)


def _path_to_text(rows: Sequence[Mapping[str, object]], column: str) -> str:
    """The way from an answer to its text: "" for a text, `.text.0` for SQuAD's object with lists."""
    paths = []
    for value in (row.get(column) for row in rows):
        path = ""
        for _ in range(3):
            key = next((key for key in ("text", "value") if isinstance(value, dict) and key in value), None)
            if isinstance(value, list) and value:
                path, value = f"{path}.0", value[0]
            elif key is not None and isinstance(value, dict):
                path, value = f"{path}.{key}", value[key]
        paths.append(path)
    return max(paths, key=len)


# What is given, and what is refused


def _given(
    rows: Sequence[Mapping[str, object]],
    head: Sequence[object],
    format: str,  # noqa: A002
    columns: Columns,
) -> Layout:
    """The layout that `data.columns` gives."""
    if unknown := [name for name in columns if name not in FIELDS]:
        hint = f"the fields are {', '.join(FIELDS)}"
        raise DataError(f"data.columns has no field `{unknown[0]}`", place="data.columns", hint=hint)
    missing = [
        path for path in columns.values() if not any(_value(row, path) is not _MISSING for row in rows)
    ]
    if missing:
        names = ", ".join(f"`{path}`" for path in missing)
        raise DataError(
            f"no row has the column {names} of data.columns", hint=f"the rows have {_listed(rows)}"
        )
    parts = ", ".join(f"{name} is `{path}`" for name, path in columns.items())
    if format != "auto":
        return Layout(format, f"data.columns: {parts}", columns)
    rendered = [mapped(row, columns) for row in head]
    only = [{key: row[key] for key in columns if key in row} for row in rendered if isinstance(row, dict)]
    try:
        detected = detect(only)
    except DataError:
        try:
            detected = detect(rendered)
        except DataError as error:
            raise _no_format(rows, error) from error
    return Layout(detected.format, f"data.columns: {parts}", columns)


def _refuse_preferences(rows: Sequence[Mapping[str, object]]) -> None:
    """Raise DataError for pairs of a better and a worse answer, and for answers that are marked as good or bad."""
    if not rows or any(are_turns(row.get("messages")) for row in rows):
        return
    if all("chosen" in row and "rejected" in row for row in rows):
        is_chat = isinstance(rows[0]["chosen"], list)
        question = next((name for name in _QUESTIONS if name in rows[0]), _ANY)
        columns = {"messages": "chosen"} if is_chat else {"instruction": question, "output": "chosen"}
        if not is_chat and question == _ANY:
            columns = {"text": "chosen"}
        raise DataError(
            "the rows have `chosen` and `rejected`: supervised training uses one answer",
            hint=f"train.method=dpo learns from both, {_setting(columns)} trains the chosen one",
        )
    if all("completion" in row and isinstance(row.get("label"), bool) for row in rows):
        raise DataError(
            "the rows have `completion` and a `label` that is true or false: the bad answers would be trained too",
            hint="train.method=kto learns from both; keep the rows with `label` true, or data.format=completion trains "
            "all of them",
        )


def _ambiguous(
    questions: Sequence[str], contexts: Sequence[str], choices: Sequence[str], answers: Sequence[str]
) -> DataError:
    names = ", ".join(f"`{name}`" for name in [*questions, *contexts, *choices, *answers])
    question = questions[0] if questions else _ANY
    context = {"input": contexts[0]} if contexts else {}
    columns = {"instruction": question, **context, "output": answers[0]}
    hint = f"choose the columns: {_setting(columns)}"
    if questions == ["text"]:
        hint += ", or data.format=text for `text` alone"
    return DataError(f"the columns can be read in several ways: {names}", hint=hint)


def _no_format(rows: Sequence[Mapping[str, object]], error: DataError) -> DataError:
    """The error for rows that fit no format, with the `data.columns` to write."""
    names = {key.casefold(): key for row in rows for key in row}
    if rows and all({"role", "content"} <= row.keys() or {"from", "value"} <= row.keys() for row in rows):
        hint = 'write {"messages": [...]} with all turns of one conversation in one row'
        return DataError("each row is one turn of a conversation", hint=hint)
    if not names:
        return error
    question, answer = (
        next((names[name] for name in known if name in names), _ANY)
        for known in ((*_QUESTIONS, *_CONTEXTS), _ANSWERS)
    )
    if (question, answer) == ("instruction", "output"):
        message = "fewer than half of the first rows have both `instruction` and `output`"
        return DataError(message, hint="add what is missing, or name other columns with data.columns")
    hint = (
        f"name the columns: {_setting({'instruction': question, 'output': answer})}, or text, messages, "
        "prompt and completion; `lorafit config data.columns` lists the fields"
    )
    return DataError(error.problems[0].message, hint=hint)


def _setting(columns: Mapping[str, str]) -> str:
    """`data.columns` as one writes it in a shell."""
    values = (
        f"{field}: {name if name.isidentifier() and yaml.safe_load(name) == name else json_line(name)}"
        for field, name in columns.items()
    )
    return f"data.columns={shell('{' + ', '.join(values) + '}')}"


def _listed(rows: Sequence[Mapping[str, object]]) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return ", ".join(f"`{key[:40]}`" for key in keys[:20]) + (", ..." if len(keys) > 20 else "")
