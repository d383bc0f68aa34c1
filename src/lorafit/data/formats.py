"""Rows of every dataset format as one small set of types; wrong rows become problems, all at once.

Knows nothing of files (sources), of templates or of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from lorafit.errors import DataError, Problem

Role = Literal["system", "user", "assistant"]
FORMATS = ("alpaca", "messages", "sharegpt", "completion", "text")

# What a row of each format must have; a tuple within the tuple means "one of these".
_NEEDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "alpaca": (("instruction",), ("output",)),
    "messages": (("messages",),),
    "sharegpt": (("conversations", "conversation"),),
    "completion": (("prompt",), ("completion",)),
    "text": (("text",),),
}
_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT_ROLES: dict[str, Role] = {
    **_ROLES, "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
}  # fmt: skip
_TOOL_ROLES = {"tool", "function", "function_call", "observation", "ipython"}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Instruction:
    """A task, an optional input to it ("" is none), and the answer to learn; the answer may be empty."""

    instruction: str
    input: str
    output: str
    system: str = ""

    @property
    def question(self) -> str:
        """What is asked, for showing."""
        return f"{self.instruction}\n\n{self.input}" if self.input else self.instruction

    @property
    def answer(self) -> str:
        """The answer to learn."""
        return self.output


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation: an optional system turn first, then turns of which the last is the assistant's."""

    messages: tuple[Message, ...]

    @property
    def question(self) -> str:
        """The turn that the last answer answers, for showing."""
        return self.messages[-2].content if len(self.messages) > 1 else ""

    @property
    def answer(self) -> str:
        """The last answer."""
        return self.messages[-1].content


@dataclass(frozen=True, slots=True)
class Completion:
    """A text and its continuation to learn, as they are."""

    prompt: str
    completion: str

    @property
    def question(self) -> str:
        """The prompt, for showing."""
        return self.prompt

    @property
    def answer(self) -> str:
        """The continuation to learn."""
        return self.completion


@dataclass(frozen=True, slots=True)
class Text:
    """A text to learn as a whole."""

    text: str


Content = Instruction | Chat | Completion | Text


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its 0-based number over all sources, where a person finds it, and what it says."""

    number: int
    place: str
    content: Content


@dataclass(frozen=True, slots=True)
class Detected:
    """A format and the sentence that tells the user why it was chosen."""

    format: str
    reason: str


def detect(first_rows: Sequence[object]) -> Detected:
    """The format that most of `first_rows` fit, the earlier of FORMATS where two fit equally.

    Rows that do not fit are left for `parse` to report. Raises DataError when no format fits half of them.
    """
    found = [{str(key) for key in row} for row in first_rows if isinstance(row, Mapping)]
    fits = {name: sum(_fits(keys, name) for keys in found) for name in FORMATS}
    best = max(FORMATS, key=lambda name: fits[name])
    if not first_rows or 2 * fits[best] < len(first_rows):
        raise DataError.of([_nothing_fits(found)])
    needs = " and ".join(
        f"`{next((key for key in choice if any(key in keys for keys in found)), choice[0])}`"
        for choice in _NEEDS[best]
    )
    if fits[best] == len(first_rows):
        return Detected(best, f"every row has {needs}")
    return Detected(best, f"{fits[best]} of the first {len(first_rows)} rows have {needs}")


def _fits(keys: set[str], name: str) -> bool:
    return all(any(key in keys for key in choice) for choice in _NEEDS[name])


def _nothing_fits(found: Sequence[set[str]]) -> Problem:
    keys = sorted(set().union(*found))
    named = ", ".join(f"`{key[:40]}`" for key in keys[:20]) + (", ..." if len(keys) > 20 else "")
    have = f"the rows have {named}" if keys else "no row is an object with keys"
    needs = "; ".join(
        f"{name} needs " + " and ".join(" or ".join(f"`{key}`" for key in choice) for choice in choices)
        for name, choices in _NEEDS.items()
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
    read = _READERS[format]
    problems: list[Problem] = []
    rows: list[Row] = []
    for number, (raw, place) in enumerate(zip(raw_rows, places, strict=True), start):
        if isinstance(raw, dict):
            rows.append(Row(number, place, read(_Fields(raw, place, problems))))
        else:
            hint = f"each row must be an object with the fields of the {format} format"
            problems.append(Problem(f"the row is {_kind(raw)}, not an object", place, hint))
    if problems:
        raise DataError.of(problems)
    return rows


class _Fields:
    """The fields of one object of a row; what is wrong with them goes to `problems`."""

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
        """The text of `field`, which must say something; "" after a problem."""
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

    def objects(self, field: str, of: str) -> list[_Fields]:
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
                _Fields(item, f"{self.place}, {field}[{index}]", self.problems)
                for index, item in enumerate(value)
            ]
        return []


def undecodable(text: str) -> str:
    """What in `text` no tokenizer can take, "" if nothing."""
    if "\0" in text:
        return f"a NUL character at position {text.index(chr(0))}"
    if text.isascii():
        return ""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"a lone surrogate U+{ord(text[error.start]):04X} at position {error.start}"
    return ""


def _kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case list():
            return "a list"
        case dict():
            return "an object"
    return f"a {type(value).__name__}"


def _alpaca(row: _Fields) -> Instruction:
    # An empty answer is not wrong in itself: the original Alpaca has some, and whole-text training uses them.
    return Instruction(
        row.filled("instruction"), row.optional("input"), row.required("output"), row.optional("system")
    )


def _messages(row: _Fields) -> Chat:
    turns = [
        _turn(turn, "role", "content", _ROLES, _parts)
        for turn in row.objects("messages", "turns with `role` and `content`")
    ]
    return _chat(row, "messages", turns)


def _sharegpt(row: _Fields) -> Chat:
    field = (
        "conversation" if "conversation" in row.raw and "conversations" not in row.raw else "conversations"
    )
    turns = [
        _turn(turn, "from", "value", _SHAREGPT_ROLES, _Fields.checked)
        for turn in row.objects(field, "turns with `from` and `value`")
    ]
    if system := row.optional("system"):
        turns.insert(0, Message("system", system))
    return _chat(row, field, turns)


def _turn(
    turn: _Fields,
    role_key: str,
    text_key: str,
    roles: Mapping[str, Role],
    read_text: Callable[[_Fields, str, object], str],
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


def _parts(turn: _Fields, field: str, value: object) -> str:
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


def _chat(row: _Fields, field: str, turns: Sequence[Message | None]) -> Chat:
    """A conversation that can be trained on; its form is judged only when every turn could be read."""
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


def _completion(row: _Fields) -> Completion:
    return Completion(row.required("prompt"), row.filled("completion"))


def _text(row: _Fields) -> Text:
    return Text(row.filled("text"))


_READERS = cast(
    dict[str, Callable[[_Fields], Content]],
    {
        "alpaca": _alpaca,
        "messages": _messages,
        "sharegpt": _sharegpt,
        "completion": _completion,
        "text": _text,
    },
)
