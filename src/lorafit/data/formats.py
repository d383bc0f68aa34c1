"""Rows of every dataset format as one small set of types; wrong rows become problems, all at once.

This file knows no data files (see sources), no templates and no tokens.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from lorafit.errors import DataError, Problem

Role = Literal["system", "user", "assistant"]
ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT_ROLES: dict[str, Role] = {
    **ROLES, "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
}  # fmt: skip
_TOOL_ROLES = {"tool", "function", "function_call", "observation", "ipython"}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


class Content(ABC):
    """The texts of a row. `asks`: a question precedes the answer. `has_template`: a prompt template surrounds it."""

    __slots__ = ()
    asks: ClassVar[bool] = True
    has_template: ClassVar[bool] = True

    @abstractmethod
    def fields(self) -> dict[str, str]:
        """Every text by the name of its field, in the order of reading."""

    @abstractmethod
    def answers(self) -> list[str]:
        """The texts to learn, in order; the last is the answer to `question`."""

    @abstractmethod
    def with_answer(self, answer: str) -> Content:
        """The same question with another last answer."""

    def texts(self) -> list[str]:
        """All texts that are not empty, in order."""
        return [text for text in self.fields().values() if text]

    def question(self) -> str:
        """The text that the last answer answers; "" if there is none."""
        return ""

    def turns(self) -> list[Message] | None:
        """The row as the turns of a conversation, None if it is not one."""
        return None


@dataclass(frozen=True, slots=True)
class Instruction(Content):
    """A task, an optional input to it ("" is none), and the answer to learn; the answer may be empty."""

    instruction: str
    input: str
    output: str
    system: str = ""

    def fields(self) -> dict[str, str]:
        names = ("system", "instruction", "input", "output")
        return {name: getattr(self, name) for name in names}

    def answers(self) -> list[str]:
        return [self.output]

    def with_answer(self, answer: str) -> Instruction:
        return dataclasses.replace(self, output=answer)

    def question(self) -> str:
        return f"{self.instruction}\n\n{self.input}" if self.input else self.instruction

    def turns(self) -> list[Message]:
        system = [Message("system", self.system)] if self.system else []
        return [*system, Message("user", self.question()), Message("assistant", self.output)]


@dataclass(frozen=True, slots=True)
class Chat(Content):
    """A conversation: an optional system turn first, then turns of which the last is the assistant's."""

    messages: tuple[Message, ...]

    def fields(self) -> dict[str, str]:
        return {f"messages[{index}]": message.content for index, message in enumerate(self.messages)}

    def answers(self) -> list[str]:
        return [message.content for message in self.messages if message.role == "assistant"]

    def with_answer(self, answer: str) -> Chat:
        is_answered = self.messages and self.messages[-1].role == "assistant"
        question = self.messages[:-1] if is_answered else self.messages
        return Chat((*question, Message("assistant", answer)))

    def question(self) -> str:
        return self.messages[-2].content if len(self.messages) > 1 else ""

    def turns(self) -> list[Message]:
        return list(self.messages)


@dataclass(frozen=True, slots=True)
class Completion(Content):
    """A text and its continuation to learn, without any template."""

    has_template: ClassVar[bool] = False

    prompt: str
    completion: str

    def fields(self) -> dict[str, str]:
        return {"prompt": self.prompt, "completion": self.completion}

    def answers(self) -> list[str]:
        return [self.completion]

    def with_answer(self, answer: str) -> Completion:
        return Completion(self.prompt, answer)

    def question(self) -> str:
        return self.prompt


@dataclass(frozen=True, slots=True)
class Text(Content):
    """A text to learn as a whole."""

    asks: ClassVar[bool] = False
    has_template: ClassVar[bool] = False

    text: str

    def fields(self) -> dict[str, str]:
        return {"text": self.text}

    def answers(self) -> list[str]:
        return [self.text]

    def with_answer(self, answer: str) -> Text:
        return Text(answer)


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its number over all files (from 0), its place for messages, and its texts."""

    number: int
    place: str
    content: Content


@dataclass(frozen=True, slots=True)
class Detected:
    """A format, and the reason for it as a sentence for the user."""

    format: str
    reason: str


def detect(first_rows: Sequence[object]) -> Detected:
    """The format that most of `first_rows` fit, the earlier of FORMATS where two fit equally.

    `parse` reports the rows that do not fit. Raises DataError when no format fits half of them.
    """
    keys_of_rows = [{str(key) for key in row} for row in first_rows if isinstance(row, Mapping)]
    fits = {name: sum(map(known.fits, keys_of_rows)) for name, known in FORMATS.items()}
    best = max(FORMATS, key=lambda name: fits[name])
    if not first_rows or 2 * fits[best] < len(first_rows):
        raise DataError.of([_nothing_fits(keys_of_rows)])
    needs = " and ".join(
        f"`{next((key for key in choice if any(key in keys for keys in keys_of_rows)), choice[0])}`"
        for choice in FORMATS[best].needs
    )
    if fits[best] == len(first_rows):
        return Detected(best, f"every row has {needs}")
    return Detected(best, f"{fits[best]} of the first {len(first_rows)} rows have {needs}")


def _nothing_fits(keys_of_rows: Sequence[set[str]]) -> Problem:
    keys = sorted(set().union(*keys_of_rows))
    named = ", ".join(f"`{key[:40]}`" for key in keys[:20]) + (", ..." if len(keys) > 20 else "")
    have = f"the rows have {named}" if keys else "no row is an object with keys"
    needs = "; ".join(
        f"{name} needs " + " and ".join(" or ".join(f"`{key}`" for key in choice) for choice in known.needs)
        for name, known in FORMATS.items()
    )
    return Problem(f"no format fits: {have}", hint=f"rename the fields to those of one format: {needs}")


def parse(
    raw_rows: Sequence[object],
    format: str,  # noqa: A002 (the name of the setting)
    places: Sequence[str],
    start: int = 0,
) -> list[Row]:
    """`raw_rows` as rows of `format`, numbered from `start`; `places[i]` is where row i is found.

    Raises DataError with a problem for every wrong field of every row.
    """
    read = FORMATS[format].read
    problems: list[Problem] = []
    rows: list[Row] = []
    for number, (raw, place) in enumerate(zip(raw_rows, places, strict=True), start):
        if isinstance(raw, dict):
            rows.append(Row(number, place, read(Fields(raw, place, problems))))
        else:
            hint = f"each row must be an object with the fields of the {format} format"
            problems.append(Problem(f"the row is {_kind(raw)}, not an object", place, hint))
    if problems:
        raise DataError.of(problems)
    return rows


class Fields:
    """The fields of one object of a row; `problems` receives what is wrong with them."""

    def __init__(self, raw: Mapping[str, object], place: str, problems: list[Problem]) -> None:
        self.raw, self.place, self.problems = raw, place, problems

    def wrong(self, field: str, message: str, hint: str) -> None:
        self.problems.append(Problem(f"`{field}` {message}", f"{self.place}, field `{field}`", hint))

    def required(self, field: str) -> str:
        """The text of `field`, which may be empty; "" after a problem."""
        if field not in self.raw:
            self.wrong(field, "is missing", f"add `{field}` to the row, or remove the row")
            return ""
        return self.checked(field, self.raw[field])

    def filled(self, field: str) -> str:
        """The text of `field`, which must not be blank; "" after a problem."""
        before = len(self.problems)
        text = self.required(field)
        if not text.strip() and len(self.problems) == before:
            self.wrong(field, "is empty", f"write the text of `{field}`, or remove the row")
        return text

    def optional(self, field: str) -> str:
        """The text of `field`, "" where it is missing or null."""
        value = self.raw.get(field)
        return "" if value is None else self.checked(field, value)

    def checked(self, field: str, value: object) -> str:
        """`value` if it is text that can be encoded, else a problem and ""."""
        if value is None:
            self.wrong(field, "is null", f"write the text of `{field}`, or remove the row")
        elif not isinstance(value, str):
            self.wrong(field, f"is {_kind(value)}, not text", f'write `{field}` as text, in "quotes"')
        elif fault := undecodable(value):
            self.wrong(field, f"holds {fault}", "remove that character from the text")
        else:
            return value
        return ""

    def objects(self, field: str, of: str) -> list[Fields]:
        """The objects in the list `field`, which must not be empty; [] after a problem."""
        value = self.raw.get(field)
        if field not in self.raw:
            self.wrong(field, "is missing", f"add `{field}`, a list of {of}, or remove the row")
        elif not isinstance(value, list):
            self.wrong(field, f"is {_kind(value)}, not a list", f"write `{field}` as a list of {of}")
        elif not value:
            self.wrong(field, "is empty", f"add at least one of the {of}, or remove the row")
        elif other := [item for item in value if not isinstance(item, dict)]:
            self.wrong(field, f"holds {_kind(other[0])}", f"write `{field}` as a list of {of}")
        else:
            return [
                Fields(item, f"{self.place}, {field}[{index}]", self.problems)
                for index, item in enumerate(value)
            ]
        return []


def undecodable(text: str) -> str:
    """Which character of `text` no tokenizer accepts, "" if none."""
    if "\0" in text:
        return f"a NUL character at position {text.index(chr(0))}"
    if text.isascii():
        return ""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"a lone surrogate U+{ord(text[error.start]):04X} at position {error.start}"
    return ""


_KINDS: dict[type, str] = {
    type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list",
    dict: "an object",
}  # fmt: skip


def _kind(value: object) -> str:
    return _KINDS.get(type(value), f"a {type(value).__name__}")


def _alpaca(row: Fields) -> Instruction:
    # An empty answer is not wrong in itself: the original Alpaca has some, and whole-text training uses them.
    return Instruction(
        row.filled("instruction"), row.optional("input"), row.required("output"), row.optional("system")
    )


def _messages(row: Fields) -> Chat:
    turns = [
        _turn(turn, "role", "content", ROLES, _parts)
        for turn in row.objects("messages", "turns with `role` and `content`")
    ]
    return _chat(row, "messages", turns)


def _sharegpt(row: Fields) -> Chat:
    field = (
        "conversation" if "conversation" in row.raw and "conversations" not in row.raw else "conversations"
    )
    turns = [
        _turn(turn, "from", "value", _SHAREGPT_ROLES, Fields.checked)
        for turn in row.objects(field, "turns with `from` and `value`")
    ]
    if system := row.optional("system"):
        turns.insert(0, Message("system", system))
    return _chat(row, field, turns)


def _turn(
    turn: Fields,
    role_key: str,
    text_key: str,
    roles: Mapping[str, Role],
    read_text: Callable[[Fields, str, object], str],
) -> Message | None:
    """One turn of a conversation, or None after a problem."""
    before = len(turn.problems)
    name = turn.required(role_key)
    if len(turn.problems) == before and (
        name in _TOOL_ROLES or turn.raw.get("tool_calls") or turn.raw.get("function_call")
    ):
        turn.wrong(role_key, "belongs to a tool call, which is not supported", "remove the row")
    elif len(turn.problems) == before and name not in roles:
        known = ", ".join(f"`{role}`" for role in roles)
        turn.wrong(role_key, f"is {name!r}, which is no known role", f"use one of {known}")
    elif text_key not in turn.raw:
        turn.wrong(text_key, "is missing", f"add `{text_key}` to the turn, or remove the row")
    else:
        text = read_text(turn, text_key, turn.raw[text_key])
        if not text.strip() and roles.get(name) == "assistant" and len(turn.problems) == before:
            turn.wrong(text_key, "is empty: nothing to train on", "write the answer, or remove the row")
        if len(turn.problems) == before:
            return Message(roles[name], text)
    return None


def _parts(turn: Fields, field: str, value: object) -> str:
    """Content as text, or as a list of text parts, joined."""
    if not isinstance(value, list):
        return turn.checked(field, value)
    texts: list[str] = []
    for index, part in enumerate(value):
        name = f"{field}[{index}]"
        if isinstance(part, dict) and part.get("type") == "text":
            texts.append(turn.checked(f"{name}.text", part.get("text")))
        else:
            kind = repr(part["type"]) if isinstance(part, dict) and "type" in part else _kind(part)
            hint = 'write each part as {"type": "text", "text": "..."}, or remove the row'
            turn.wrong(name, f"is a part of type {kind}; only text is supported", hint)
    return "".join(texts)


def _chat(row: Fields, field: str, turns: Sequence[Message | None]) -> Chat:
    """A conversation to train on. Its form is checked only if every turn could be read."""
    messages = tuple(turn for turn in turns if turn is not None)
    roles = [message.role for message in messages]
    if len(messages) < len(turns) or not turns:
        pass
    elif roles.count("system") > 1:
        row.wrong(field, "has two system turns", "join them into one at the start")
    elif "system" in roles[1:]:
        row.wrong(field, "has a system turn after the start", "move it to the start")
    elif "assistant" not in roles:
        row.wrong(field, "has no assistant turn: nothing to train on", "add the answer, or remove the row")
    elif roles[-1] != "assistant":
        hint = "add the assistant's answer, or remove the last turn"
        row.wrong(field, f"ends in a {roles[-1]} turn: nothing to train after it", hint)
    return Chat(messages)


@dataclass(frozen=True, slots=True)
class Format:
    """One row format: `needs` are the keys of a row, each a choice of names; `read` makes the `content` of a row."""

    needs: tuple[tuple[str, ...], ...]
    content: type[Content]
    read: Callable[[Fields], Content]

    def fits(self, keys: set[str]) -> bool:
        """Whether a row with `keys` has all that the format needs."""
        return all(any(key in keys for key in choice) for choice in self.needs)


# By the name in `data.format`; an entry here is all that detection, training and checks need of a new format.
FORMATS: dict[str, Format] = {
    "alpaca": Format((("instruction",), ("output",)), Instruction, _alpaca),
    "messages": Format((("messages",),), Chat, _messages),
    "sharegpt": Format((("conversations", "conversation"),), Chat, _sharegpt),
    "completion": Format(
        (("prompt",), ("completion",)),
        Completion,
        lambda row: Completion(row.required("prompt"), row.filled("completion")),
    ),
    "text": Format((("text",),), Text, lambda row: Text(row.filled("text"))),
}
