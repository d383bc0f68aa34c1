"""Keys of rows and turns: each is read, refused by name or counted; all spellings of conversations are read."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.data.formats import (
    FORMATS,
    Chat,
    Completion,
    Content,
    Fields,
    Instruction,
    Message,
    Row,
    detect,
    parse,
)
from lorafit.data.row_fields import KEYS, REASONING, SYSTEM, TOOLS, TRAIN, WEIGHT
from lorafit.data.turns import ROLES
from lorafit.errors import DataError

ASKED, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
ROWS: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "a", "output": "b"},
    "messages": {"messages": [ASKED, ANSWER]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
    "completion": {"prompt": "a", "completion": "b"},
    "text": {"text": "a"},
    "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
# A value of every key that other tools give a meaning, in the form in which they write it.
VALUES: dict[str, Any] = {
    **dict.fromkeys(WEIGHT, 0.5),
    **dict.fromkeys(TRAIN, False),
    **dict.fromkeys(REASONING, "Hm."),
    **{key: [TOOL] for key in TOOLS},
    **dict.fromkeys(SYSTEM, "Be kind."),
    "tool_calls": [CALL],
    "function_call": CALL["function"],
    "tool_call_id": "c1",
    "history": [["q", "a"]],
    "chat_template_kwargs": {"enable_thinking": False},
}


def read(format_name: str, raw: dict[str, Any]) -> Row:
    [row] = parse([raw], format_name, ["x.json row 1"])
    return row


def messages(*turns: dict[str, Any], **keys: Any) -> Chat:
    content = read("messages", {"messages": [*turns], **keys}).content
    assert isinstance(content, Chat)
    return content


def test_every_format_is_here() -> None:
    assert set(ROWS) == set(FORMATS)


@pytest.mark.parametrize(("format_name", "key"), [*itertools.product(FORMATS, KEYS)])
def test_a_key_with_a_meaning_is_used_or_refused_by_name(format_name: str, key: str) -> None:
    """In a row, then in its last turn: it changes what is read, or the row is refused; it is never only counted."""
    row = ROWS[format_name]
    value = VALUES.get(key, ["x.png"])
    variants = [{**row, key: value}]
    for field in ("messages", "conversations"):
        if field in row:
            variants.append({**row, field: [*row[field][:-1], {**row[field][-1], key: value}]})
    plain = read(format_name, row)
    for raw in variants:
        try:
            told = read(format_name, raw)
        except DataError as error:
            [problem] = error.problems
            assert f"`{key}`" in problem.message
            assert problem.hint
        else:
            assert (told.content, told.weight) != (plain.content, plain.weight), raw
            assert not told.unused


@pytest.mark.parametrize("format_name", FORMATS)
def test_any_other_key_is_counted_by_its_name(format_name: str) -> None:
    row = ROWS[format_name]
    told = read(format_name, {**row, "id": 7, "source": "web", "note": None, "tags": []})
    assert told.unused == ("id", "source")
    assert told.content == read(format_name, row).content


def test_keys_of_turns_are_counted_once_a_row() -> None:
    row = read("messages", {"messages": [{**ASKED, "at": 1}, {**ANSWER, "at": 2}], "at": 3})
    assert row.unused == ("at of turns", "at")


@given(st.dictionaries(st.text(max_size=8), st.none() | st.integers() | st.text(max_size=3), max_size=4))
def test_no_key_of_any_row_is_lost(keys: dict[str, Any]) -> None:
    raw = {**keys, **ROWS["text"]}
    try:
        row = read("text", raw)
    except DataError as error:
        assert all(any(f"`{key}`" in problem.message for key in keys) for problem in error.problems)
        return
    said = {key for key, value in raw.items() if value is not None and value != "" and key != "text"}
    assert set(row.unused) == said - set(WEIGHT) - set(TRAIN)


@pytest.mark.parametrize(
    ("keys", "weight"),
    [
        ({}, 1), ({"weight": 0}, 0), ({"weight": 0.25}, 0.25), ({"weight": 3}, 3), ({"weight": None}, 1),
        ({"train": False}, 0), ({"train": True}, 1), ({"training": 0}, 0), ({"loss": False}, 0),
        ({"loss_weight": 2}, 2), ({"sample_weight": 0.5, "weight": 0.5}, 0.5),
    ],
)  # fmt: skip
def test_weights_of_rows_and_of_turns(keys: dict[str, Any], weight: float) -> None:
    row = read("alpaca", {**ROWS["alpaca"], **keys})
    assert row.weight == weight
    turn = messages(ASKED, {**ANSWER, **keys}, ASKED, ANSWER).messages[1]
    assert turn.weight == weight
    assert all(
        key in "".join(row.aliases) for key, value in keys.items() if key != "weight" and value is not None
    )


@pytest.mark.parametrize(
    "keys", [{"weight": -1}, {"weight": "x"}, {"weight": float("nan")}, {"loss": 2.5}, {"train": "yes"},
             {"weight": 1, "train": False}],
)  # fmt: skip
def test_a_weight_that_is_none_is_refused(keys: dict[str, Any]) -> None:
    for raw in ({**ROWS["alpaca"], **keys}, {"messages": [ASKED, {**ANSWER, **keys}]}):
        with pytest.raises(DataError, match="|".join(f"`{key}`" for key in keys)):
            read("alpaca" if "instruction" in raw else "messages", raw)


def test_a_turn_that_cannot_be_trained_is_not_switched_on() -> None:
    assert messages({**ASKED, "weight": 0, "train": False}, ANSWER) == messages(ASKED, ANSWER)
    with pytest.raises(DataError, match="`train` is set beside a user turn"):
        messages({**ASKED, "train": True}, ANSWER)


ROLE_KEYS, TEXT_KEYS = ("role", "from"), ("content", "value", "text")
CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns")


@given(
    field=st.sampled_from(CONVERSATIONS),
    role_key=st.sampled_from(ROLE_KEYS),
    text_key=st.sampled_from(TEXT_KEYS),
    names=st.tuples(
        *(st.sampled_from([n for n in ROLES if ROLES[n] == r]) for r in ("system", "user", "assistant"))
    ),
    spell=st.sampled_from([str, str.upper, str.title]),
)
def test_all_spellings_of_a_conversation_are_read(
    field: str, role_key: str, text_key: str, names: tuple[str, str, str], spell: Any
) -> None:
    raw: dict[str, Any] = {field: [{role_key: spell(name), text_key: f"text {name}"} for name in names]}
    content = read(detect([raw]).format, raw).content
    roles = ("system", "user", "assistant")
    expected = (Message(role, f"text {name}") for role, name in zip(roles, names, strict=True))  # type: ignore[arg-type]
    assert content == Chat(tuple(expected))


def test_a_column_that_only_sounds_like_a_conversation_is_none() -> None:
    assert detect([{"text": "a", "turns": 3, "chat": "x"}]).format == "text"


@pytest.mark.parametrize("name", SYSTEM)
def test_a_system_prompt_of_the_row_is_the_first_turn(name: str) -> None:
    assert messages(ASKED, ANSWER, **{name: "s"}).messages[0] == Message("system", "s")
    first = {"role": "system", "content": "s"}
    assert messages(first, ASKED, ANSWER, **{name: "s"}) == messages(first, ASKED, ANSWER)
    with pytest.raises(DataError, match="differs from the system turn"):
        messages({**first, "content": "other"}, ASKED, ANSWER, **{name: "s"})


@pytest.mark.parametrize("key", REASONING)
def test_reasoning_under_each_of_its_names(key: str) -> None:
    assert messages(ASKED, {**ANSWER, key: "Hm."}).messages[1].reasoning == "Hm."
    with pytest.raises(DataError, match=f"`{key}`"):
        messages({**ASKED, key: "Hm."}, ANSWER)


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": 1}, "id": "c1"}]},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}, "id": "c1"}'},
    ],
)  # fmt: skip
def test_all_spellings_of_a_call_are_one(turn: dict[str, Any]) -> None:
    [call] = messages(ASKED, turn, {"role": "tool", "content": "2"}, ANSWER).messages[1].calls
    assert (call.name, call.value, call.id) == ("f", {"a": 1}, "c1")


@pytest.mark.parametrize("role", [name for name in ROLES if ROLES[name] == "tool"])
def test_results_of_tools(role: str) -> None:
    result = {"role": role, "content": "2", "name": "f", "tool_call_id": "c1"}
    turns = messages(ASKED, {"role": "assistant", "tool_calls": [CALL]}, result, ANSWER).messages
    assert turns[2] == Message("tool", "2", name="f", call_id="c1")


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}, "a call without a name"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "server": "x"}]}, "a call with `server`"),
        ({"role": "assistant", "tool_calls": "f()"}, "neither a list nor the JSON text"),
        ({"from": "function_call", "value": "f()"}, "no call of a tool as JSON"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "`tool_calls` is not used here"),
    ],
)
def test_calls_that_cannot_be_read(turn: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        messages(ASKED, turn, ANSWER)
    assert "messages[1]" in caught.value.problems[0].place


@pytest.mark.parametrize("tools", [[TOOL], [TOOL["function"]], '[{"name": "f", "parameters": {}}]'])
def test_tools_in_all_their_forms(tools: Any) -> None:
    expected = '[{"type": "function", "function": {"name": "f", "parameters": {}}}]'
    assert messages(ASKED, ANSWER, tools=tools).tools == expected
    assert not messages(ASKED, ANSWER, tools=None).tools
    with pytest.raises(DataError, match="`tools`"):
        messages(ASKED, ANSWER, tools=[{"description": "no name"}])


def test_a_history_is_earlier_turns() -> None:
    row: dict[str, Any] = {"instruction": "a", "output": "b", "system": "s", "history": [["q", "r"]]}
    content = read("alpaca", row).content
    roles = [("system", "s"), ("user", "q"), ("assistant", "r"), ("user", "a"), ("assistant", "b")]
    assert content == Chat(tuple(Message(role, text) for role, text in roles))  # type: ignore[arg-type]
    assert read("alpaca", {**row, "history": []}).content == Instruction("a", "", "b", "s")
    with pytest.raises(DataError, match="`history`"):
        read("alpaca", {**row, "history": ["q"]})


def test_a_prompt_and_a_completion_of_turns_are_one_conversation() -> None:
    first = {"role": "system", "content": "s"}
    raw = {"prompt": [first, ASKED, ANSWER, ASKED], "completion": [ANSWER]}
    content = read("completion", raw).content
    assert isinstance(content, Chat)
    assert [turn.weight for turn in content.messages if turn.role == "assistant"] == [0, 1]
    assert content.messages[-1] == Message("assistant", "Ho")


@pytest.mark.parametrize(
    "raw",
    [
        {"prompt": [ASKED], "completion": "b"},
        {"prompt": "a", "completion": [ANSWER]},
        {"prompt": [ASKED], "completion": []},
        {"prompt": [ASKED], "completion": [ASKED]},
    ],
)
def test_a_prompt_and_a_completion_of_two_kinds_are_refused(raw: dict[str, Any]) -> None:
    with pytest.raises(DataError) as caught:
        read("completion", raw)
    assert len(caught.value.problems) == 1


def test_a_toy_format_is_told_of_keys_that_it_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def riddle(row: Fields) -> Content:
        return Completion(row.required("clue"), row.filled("solution"))

    monkeypatch.setitem(FORMATS, "riddle", type(FORMATS["text"])((("clue",),), Completion, riddle))
    assert read("riddle", {"clue": "a", "solution": "b", "level": 3}).unused == ("level",)
    with pytest.raises(DataError, match="`reasoning` is not used here: it is reasoning"):
        read("riddle", {"clue": "a", "solution": "b", "reasoning": "c"})
