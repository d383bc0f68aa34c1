"""Conversations from rows: the turns with all spellings of their keys and roles, calls of tools, and tools.

A name is read where it has one meaning. Every other name is refused.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lorafit.data.content import Call, Chat, Message, Role
from lorafit.data.row_fields import REASONING, SYSTEM, TOOLS, TRAIN, Fields, is_empty, kind
from lorafit.data.strict_json import RepeatedKeyError, parse_strict
from lorafit.errors import DataError, Problem

ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "chatbot", "ai"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response", "function_response"), "tool"),
}  # fmt: skip
_CALL_ROLES = ("function_call", "tool_call")  # the content of such an assistant turn is its call
_ROLE_KEYS, _TEXT_KEYS = ("role", "from"), ("content", "value", "text")
_CALL_HINT = 'write {"name": "...", "arguments": {...}}'
_CALL_KEYS = {"id", "type", "index", "function", "name", "arguments", "parameters"}


def conversation(row: Fields, field: str) -> Chat:
    """The conversation in the list `field`, with the system prompt and the tools of the row."""
    messages = [read_turn(turn) for turn in row.objects(field, "turns with `role` and `content`")]
    return finished(row, field, messages)


def prompt_and_completion(row: Fields) -> Chat:
    """The conversation of the lists `prompt` and `completion`. Only the turns of the completion are trained."""
    turns: list[Message | None] = []
    for field in ("prompt", "completion"):
        read = [read_turn(turn) for turn in row.objects(field, "turns with `role` and `content`")]
        if field == "prompt":
            read = [turn and dataclasses.replace(turn, weight=0.0) for turn in read]
        turns += read or [None]
    return finished(row, "completion", turns)


def finished(row: Fields, field: str, turns: Sequence[Message | None]) -> Chat:
    """A conversation to train on. None is a turn with a problem; the form is checked only if there is none."""
    before = len(row.problems)
    messages = [turn for turn in turns if turn is not None]
    system, tools = row.one_of(SYSTEM), _tools(row)
    if system and len(messages) == len(turns):
        if messages and messages[0].role == "system":
            if messages[0].content != system:
                row.wrong("system", f"differs from the system turn of `{field}`", "keep one of them")
        else:
            messages.insert(0, Message("system", system))
    roles = [message.role for message in messages]
    if None in turns or not turns or len(row.problems) > before:
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
    return Chat(tuple(messages), tools)


def as_messages(turns: object) -> tuple[Message, ...]:
    """A conversation given as Messages, or as objects with `role` and `content`. Raises DataError."""
    if isinstance(turns, Sequence) and not isinstance(turns, str | bytes):
        if all(isinstance(turn, Message) for turn in turns):
            return tuple(turns)
        problems: list[Problem] = []
        row = Fields({"messages": [_as_object(turn) for turn in turns]}, "the conversation", problems)
        chat = question(row)
        if problems:
            raise DataError.of(problems)
        return chat.messages
    hint = 'write [{"role": "user", "content": "..."}]'
    raise DataError(f"a conversation is a list of turns, not {kind(turns)}", hint=hint)


def question(row: Fields) -> Chat:
    """The conversation in `messages`, with the tools of the row. The answer to its last turn is asked for.

    Earlier answers may be empty: nothing of them is trained.
    """
    read = [
        read_turn(turn, is_asked=True) for turn in row.objects("messages", "turns with `role` and `content`")
    ]
    return Chat(tuple(turn for turn in read if turn is not None), _tools(row))


def _as_object(turn: object) -> object:
    if isinstance(turn, Message):
        return {"role": turn.role, "content": turn.content}
    return dict(turn) if isinstance(turn, Mapping) else turn


def read_turn(turn: Fields, is_asked: bool = False) -> Message | None:
    """One turn of a conversation, or None after a problem. `is_asked`: it is part of a question."""
    before = len(turn.problems)
    role_key = turn.first(_ROLE_KEYS if "value" not in turn.raw else _ROLE_KEYS[::-1])
    text_key = turn.first(_TEXT_KEYS if role_key != "from" else ("value", "content", "text"))
    name = turn.required(role_key)
    message: Message | None = None
    if len(turn.problems) == before:
        spelled = name.strip().lower()
        if spelled in _CALL_ROLES:
            calls = _calls_in_text(turn, text_key, turn.get(text_key))
            message = Message("assistant", "", turn.one_of(REASONING), calls)
        elif spelled in ROLES:
            message = _read(turn, ROLES[spelled], text_key, is_asked)
        else:
            known = ", ".join(f"`{role}`" for role in (*ROLES, *_CALL_ROLES))
            turn.wrong(role_key, f"is {name!r}, which is no known role", f"use one of {known}")
    if message is not None:
        message = dataclasses.replace(message, weight=_weight(turn, message.role))
    if len(turn.problems) == before:
        turn.finish()
    return message if len(turn.problems) == before else None


def _read(turn: Fields, role: Role, text_key: str, is_asked: bool) -> Message:
    before = len(turn.problems)
    match role:
        case "assistant":
            calls = _calls(turn)
            may_be_empty = is_asked or bool(calls)
            text = _text(turn, text_key, may_be_missing=may_be_empty)
            if not text.strip() and not may_be_empty and len(turn.problems) == before:
                turn.wrong(text_key, "is empty: nothing to train on", "write the answer, or remove the row")
            return Message(role, text, turn.one_of(REASONING), calls)
        case "tool":
            name, call_id = turn.optional("name"), turn.optional("tool_call_id")
            value = turn.raw.get(text_key)
            if isinstance(value, dict):  # a result as an object: the same as its JSON text
                turn.get(text_key)
                return Message(role, json.dumps(value, ensure_ascii=False), name=name, call_id=call_id)
            return Message(role, _text(turn, text_key), name=name, call_id=call_id)
    return Message(role, _text(turn, text_key))


def _weight(turn: Fields, role: Role) -> float:
    """The weight of an assistant turn. No other turn is trained, so that a weight changes nothing there."""
    weight = turn.weight()
    if role == "assistant":
        return weight
    if name := next((name for name in TRAIN if turn.raw.get(name)), ""):
        turn.wrong(name, f"is set beside a {role} turn", "only assistant turns are trained: remove it there")
    return 1.0


def _text(turn: Fields, field: str, may_be_missing: bool = False) -> str:
    """The content of a turn: text, or a list of text parts, joined."""
    value = turn.get(field)
    if may_be_missing and value is None:
        return ""
    if field not in turn.raw:
        turn.wrong(field, "is missing", f"add `{field}` to the turn, or remove the row")
        return ""
    if not isinstance(value, list):
        return turn.checked(field, value)
    texts: list[str] = []
    for index, part in enumerate(value):
        name = f"{field}[{index}]"
        if isinstance(part, dict) and part.get("type") == "text":
            texts.append(turn.checked(f"{name}.text", part.get("text")))
        else:
            which = repr(part["type"]) if isinstance(part, dict) and "type" in part else kind(part)
            hint = 'write each part as {"type": "text", "text": "..."}, or remove the row'
            turn.wrong(name, f"is a part of type {which}; only text is supported", hint)
    return "".join(texts)


def _calls(turn: Fields) -> tuple[Call, ...]:
    """The calls of an assistant turn: `tool_calls`, or the older `function_call`."""
    calls: list[Call | None] = []
    if not is_empty(turn.raw.get("tool_calls")):
        calls += [_call(turn, "tool_calls", value) for value in _list(turn, "tool_calls")]
    if not is_empty(turn.raw.get("function_call")):
        calls.append(_call(turn, "function_call", turn.get("function_call")))
    return tuple(call for call in calls if call is not None)


def _calls_in_text(turn: Fields, field: str, value: object) -> tuple[Call, ...]:
    """The calls that are the content of a turn, as JSON text or as an object."""
    if isinstance(value, str):
        try:
            value = parse_strict(value)
        except ValueError as error:
            turn.wrong(field, f"is no call of a tool as JSON{_why(error)}", _CALL_HINT)
            return ()
    calls = [_call(turn, field, one) for one in (value if isinstance(value, list) else [value])]
    return tuple(call for call in calls if call is not None)


def _call(turn: Fields, field: str, value: object) -> Call | None:
    """A call in OpenAI's form, or the bare object with `name` and `arguments`."""
    outer = value if isinstance(value, dict) else {}
    function = outer["function"] if isinstance(outer.get("function"), dict) else outer
    name, arguments = function.get("name"), function.get("arguments", function.get("parameters"))
    if not isinstance(name, str) or not name:
        turn.wrong(field, "has a call without a name", _CALL_HINT)
        return None
    everything = {**outer, **function}
    if other := [key for key in everything if key not in _CALL_KEYS and not is_empty(everything[key])]:
        turn.wrong(field, f"has a call with `{other[0]}`, which is not used", "remove it from the call")
        return None
    text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
    identity = outer.get("id")
    name, text, identity = (turn.checked(field, part) for part in (name, text, identity or ""))
    return Call(name, text, identity)


def _tools(row: Fields) -> str:
    """The tools of a row as JSON text of OpenAI's form, "" for none."""
    found = [name for name in TOOLS if not is_empty(row.raw.get(name))]
    if not found:
        return ""
    name = found[0]
    tools: list[Any] = []
    for value in _list(row, name):
        tool = value if isinstance(value, dict) else {}
        inner = tool.get("function", tool)
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            hint = 'write {"type": "function", "function": {"name": "...", "parameters": {...}}}'
            row.wrong(name, "has a tool without a name", hint)
            return ""
        tools.append(tool if "function" in tool else {"type": "function", "function": tool})
    if name != TOOLS[0]:
        row.aliases[f"`{name}` as `{TOOLS[0]}`"] = None
    return row.checked(name, json.dumps(tools, ensure_ascii=False)) if tools else ""


def _list(fields: Fields, field: str) -> list[object]:
    """The list `field`, or the list in its JSON text; [] after a problem, and for an empty one."""
    value = fields.get(field)
    if isinstance(value, str):
        try:
            value = parse_strict(value)
        except ValueError as error:
            message = f"is neither a list nor the JSON text of one{_why(error)}"
            fields.wrong(field, message, f"write `{field}` as a list")
            return []
    if isinstance(value, list):
        return value
    fields.wrong(field, f"is {kind(value)}, not a list", f"write `{field}` as a list")
    return []


def _why(error: ValueError) -> str:
    return f": {error}" if isinstance(error, RepeatedKeyError) else ""
