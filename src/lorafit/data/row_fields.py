"""The fields of a row or a turn: their texts, and what becomes of each key: read, refused by name, or counted.

`KEYS` has every key to which other tools give a meaning. A format reads some of them. Where it does not, a row with one
of them is refused, because what is trained would differ from what the row means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorafit.data.strict_json import RepeatedKeyError
from lorafit.errors import Problem

WEIGHT = ("weight", "loss_weight", "sample_weight", "loss_scale")  # the first is the name of lorafit
TRAIN = ("train", "training", "trainable", "loss")
REASONING = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts", "think")
TOOLS = ("tools", "functions")
SYSTEM = ("system", "system_prompt", "system_message")
TURN_LISTS = ("dialogue", "dialog", "chat", "turns")  # a conversation only where it is a list
CONVERSATIONS = ("messages", "conversations", "conversation", *TURN_LISTS)
_MEDIA = ("image", "images", "video", "videos", "audio", "audios", "image_url", "input_audio")
_MASKS = ("mask", "masks", "loss_mask", "weights", "train_detail", "training_detail")


@dataclass(frozen=True, slots=True)
class Key:
    """A key with a meaning: what it is in other tools, and what to do where a format does not read it."""

    is_: str
    hint: str


_AS_CHAT = "write the row as `messages`"
KEYS: dict[str, Key] = {
    **dict.fromkeys(WEIGHT, Key("the weight of the loss", "write it beside an assistant turn or in the row")),
    **dict.fromkeys(TRAIN, Key("a switch of the loss", "write it beside an assistant turn or in the row")),
    **dict.fromkeys(
        _MASKS,
        Key(
            "a mask of the loss",
            "write `weight` (a number) or `train` (true or false) beside each assistant turn",
        ),
    ),
    **dict.fromkeys(
        REASONING,
        Key("reasoning", f"{_AS_CHAT} with `reasoning_content` beside an assistant turn, or remove it"),
    ),
    **dict.fromkeys(TOOLS, Key("a list of tools", f"{_AS_CHAT} with `tools` in the row, or remove it")),
    **dict.fromkeys(
        ("tool_calls", "function_call"),
        Key("calls of tools", f"{_AS_CHAT} with `tool_calls` beside an assistant turn, or remove it"),
    ),
    "tool_call_id": Key(
        "the id of a call", "write it beside a turn of the role tool, or remove it from the turn"
    ),
    **dict.fromkeys(SYSTEM, Key("a system prompt", f"{_AS_CHAT} with a system turn, or remove it")),
    "history": Key("earlier turns", f"{_AS_CHAT} with all turns, or remove it"),
    **dict.fromkeys(
        _MEDIA, Key("not text", "lorafit trains on text only: remove it from the row, or the row")
    ),
    "chat_template_kwargs": Key(
        "arguments of the chat template", "give them for all rows with data.template_args, and remove it"
    ),
}


class Fields:
    """The fields of one object of a row. `problems` receives what is wrong with them.

    `aliases` receives each key that is read as another one, `unused` each key that is not read.
    """

    def __init__(
        self,
        raw: Mapping[str, object],
        place: str,
        problems: list[Problem],
        row: Fields | None = None,
    ) -> None:
        """`row` is the row that the object is a turn of, None for the row itself."""
        self.raw, self.place, self.problems = raw, place, problems
        self.aliases: dict[str, None] = {} if row is None else row.aliases
        self.unused: dict[str, None] = {} if row is None else row.unused
        self._is_turn = row is not None
        self._read: set[str] = set()

    def wrong(self, field: str, message: str, hint: str) -> None:
        self.problems.append(Problem(f"`{field}` {message}", f"{self.place}, field `{field}`", hint))

    def get(self, field: str) -> object:
        """The value of `field`, None where it is missing. The field counts as read."""
        self._read.add(field)
        return self.raw.get(field)

    def first(self, names: Sequence[str]) -> str:
        """That of `names` which has a value, else the first that is there, else the first."""
        there = [name for name in names if name in self.raw]
        return next((name for name in there if self.raw[name] is not None), [*there, names[0]][0])

    def required(self, field: str) -> str:
        """The text of `field`, which may be empty; "" after a problem."""
        if field not in self.raw:
            self.wrong(field, "is missing", f"add `{field}` to the row, or remove the row")
            return ""
        return self.checked(field, self.get(field))

    def filled(self, field: str) -> str:
        """The text of `field`, which must not be blank; "" after a problem."""
        before = len(self.problems)
        text = self.required(field)
        if not text.strip() and len(self.problems) == before:
            self.wrong(field, "is empty", f"write the text of `{field}`, or remove the row")
        return text

    def optional(self, field: str) -> str:
        """The text of `field`, "" where it is missing or null."""
        value = self.get(field)
        return "" if value is None else self.checked(field, value)

    def one_of(self, names: Sequence[str]) -> str:
        """The text of the key among `names` that has one, "" for none. Two different texts are a problem."""
        found = {name: self.get(name) for name in names if not is_empty(self.raw.get(name))}
        for name in found:
            if name != names[0]:
                self.aliases[f"`{name}` as `{names[0]}`"] = None
        if len(set(map(repr, found.values()))) > 1:
            self.wrong(next(iter(found)), f"and `{[*found][1]}` differ", "keep one of them")
            return ""
        return next((self.checked(name, value) for name, value in found.items()), "")

    def checked(self, field: str, value: object) -> str:
        """`value` if it is text that can be encoded, else a problem and ""."""
        if value is None:
            self.wrong(field, "is null", f"write the text of `{field}`, or remove the row")
        elif not isinstance(value, str):
            self.wrong(field, f"is {kind(value)}, not text", f'write `{field}` as text, in "quotes"')
        elif fault := undecodable(value):
            self.wrong(field, f"holds {fault}", "remove that character from the text")
        else:
            return value
        return ""

    def objects(self, field: str, of: str) -> list[Fields]:
        """The objects in the list `field`, which must not be empty; [] after a problem."""
        value = self.get(field)
        if field not in self.raw:
            self.wrong(field, "is missing", f"add `{field}`, a list of {of}, or remove the row")
        elif not isinstance(value, list):
            self.wrong(field, f"is {kind(value)}, not a list", f"write `{field}` as a list of {of}")
        elif not value:
            self.wrong(field, "is empty", f"add at least one of the {of}, or remove the row")
        elif other := [item for item in value if not isinstance(item, dict)]:
            self.wrong(field, f"holds {kind(other[0])}", f"write `{field}` as a list of {of}")
        else:
            return [
                Fields(item, f"{self.place}, {field}[{index}]", self.problems, self)
                for index, item in enumerate(value)
            ]
        return []

    def weight(self) -> float:
        """The factor of the loss: a number from 0, true or false; 1 where the object has none."""
        found: dict[str, float] = {}
        for name in (*WEIGHT, *TRAIN):
            if is_empty(value := self.raw.get(name)):
                continue
            self._read.add(name)
            number = value if isinstance(value, int | float) else math.nan
            if (name in WEIGHT and 0 <= number < math.inf) or number in (0, 1):
                found[name] = float(number)
                continue
            must = "a number from 0" if name in WEIGHT else "true or false"
            hint = f"it is the weight of the loss: write {must}, or give the key another name if it is not"
            self.wrong(
                name, f"is {value if isinstance(value, int | float) else kind(value)}, not {must}", hint
            )
        for name in found:
            if name != WEIGHT[0]:
                self.aliases[f"`{name}` as `{WEIGHT[0]}`"] = None
        if len(set(found.values())) > 1:
            first, second = list(found)[:2]
            self.wrong(first, f"and `{second}` differ: {found[first]:g} and {found[second]:g}", "keep one")
        return next(iter(found.values()), 1.0)

    def finish(self) -> None:
        """Refuse each key with a meaning that was not read, and note the others in `unused`; empty ones are nothing."""
        for name, value in self.raw.items():
            if name in self._read or is_empty(value):
                continue
            if (key := KEYS.get(name)) is not None:
                self.wrong(name, f"is not used here: it is {key.is_}", key.hint)
            else:
                self.unused[f"{name} of turns" if self._is_turn else str(name)] = None


def is_empty(value: object) -> bool:
    """Whether `value` is empty: null, or a text, list or object without content."""
    return value is None or (isinstance(value, str | list | dict) and not value)


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
    dict: "an object", RepeatedKeyError: "JSON text with a key twice",
}  # fmt: skip


def kind(value: object) -> str:
    """The kind of a JSON value, as messages call it."""
    return _KINDS.get(type(value), f"a {type(value).__name__}")
