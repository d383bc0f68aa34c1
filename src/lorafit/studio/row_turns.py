"""A row as its turns, with thoughts, calls and results of tools apart, whatever a model's template does with them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lorafit.data.content import Content, Message, Preference

Kind = Literal["text", "thought", "call", "result"]
# studio.js divides the answers of a talk by the same marks
_MARKED = re.compile(
    r"<think>(?P<thought>.*?)(?:</think>|\Z)|<tool_call>(?P<call>.*?)(?:</tool_call>|\Z)", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Turn:
    """Who speaks, or the name of a field, and what is said: (kind, text) in order."""

    role: str
    parts: tuple[tuple[Kind, str], ...]


def turns_of(content: Content) -> list[Turn]:
    """The turns of a row. Of a preference the shared prompt comes first, then both answers under their names."""
    if isinstance(content, Preference):
        sides = {"chosen": content.chosen, "rejected": content.rejected}
        given = {name: _turns(side) for name, side in sides.items() if side is not None}
        first = next(iter(given.values()))
        return [*first[:-1], *(Turn(name, turns[-1].parts) for name, turns in given.items() if turns)]
    return _turns(content)


def is_divided(turns: Sequence[Turn]) -> bool:
    """Whether there is anything but the texts of one conversation."""
    return any(turn.role == "rejected" or kind != "text" for turn in turns for kind, _ in turn.parts)


def _turns(content: Content) -> list[Turn]:
    messages = content.turns()
    if messages is None:
        return [Turn(name, (("text", text),)) for name, text in content.fields().items()]
    return [Turn(message.role, tuple(_parts(message))) for message in messages]


def _parts(message: Message) -> Iterator[tuple[Kind, str]]:
    if message.role == "tool":
        yield "result", f"{message.name}: {message.content}" if message.name else message.content
        return
    if message.reasoning:
        yield "thought", message.reasoning
    if message.role == "assistant":
        yield from divided(message.content)
    else:
        yield "text", message.content
    for call in message.calls:
        yield "call", f"{call.name}({call.arguments})"


def divided(text: str) -> Iterator[tuple[Kind, str]]:
    """The thoughts and calls that a text marks, and the text between them. A thought may have its end alone."""
    if "</think>" in text and "<think>" not in text.partition("</think>")[0]:
        text = f"<think>{text}"
    start = 0
    for match in _MARKED.finditer(text):
        if between := text[start : match.start()].strip():
            yield "text", between
        kind: Kind = "call" if match["thought"] is None else "thought"
        if inside := match[kind].strip():
            yield kind, inside
        start = match.end()
    if rest := text[start:].strip() if start else text:
        yield "text", rest
