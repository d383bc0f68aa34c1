"""Tools, calls and results in requests: the prompt is that of the same turns in a row of data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from tests.serve.live import Live, live, write_and_load

from lorafit.data.content import Chat
from lorafit.data.formats import parse
from lorafit.data.prompt import Renderer
from lorafit.infer.multi_adapter import ServedModel

TEMPLATE = (
    "{%- if tools %}{{- '<tools>' + (tools | tojson) + '</tools>' }}{%- endif %}{%- for m in messages %}"
    "{{- '<|' + m.role + '|>' }}{%- if m.name %}{{- m.name + ': ' }}{%- endif %}"
    "{%- if m.reasoning_content %}{{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{%- endif %}"
    "{{- m.content if m.content is string else '' }}{%- for call in m.tool_calls or [] %}"
    "{{- '[' + call.function.name + ' ' + (call.function.arguments | tojson) + ' ' + (call.id or '') + ']' }}"
    "{%- endfor %}{{- '</s>' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)
TOOL = {
    "type": "function",
    "function": {"name": "get", "description": "</s>", "parameters": {"a": [1, None]}},
}
CALL = {"id": "c1", "type": "function", "function": {"name": "get", "arguments": '{"a": "ü"}'}}
ASK = {"role": "user", "content": "What is it?"}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "name": "get", "content": "5"}
END = {"role": "assistant", "content": "It is 5."}


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    models = write_and_load(tmp_path_factory.mktemp("models"))
    base = models.named["base"].renderer
    contract = dataclasses.replace(base.contract, chat_template=TEMPLATE)
    models.named["caller"] = ServedModel("caller", None, Renderer(contract, base.tokenizer))
    with live(models, context=4096) as running:
        yield running


def ask(there: Live, messages: list[dict[str, Any]], **more: Any) -> tuple[int, str]:
    """The status, and the error."""
    body = {"model": "caller", "messages": messages, "max_tokens": 1, **more}
    reply = there.client.post("/v1/chat/completions", json=body)
    return reply.status_code, reply.json().get("error", {}).get("message", "")


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "tools": [ASK],
    "a result": [ASK, CALLED, RESULT],
    "a call with text": [ASK, {**CALLED, "content": "Let me see."}, RESULT, END, ASK],
    "an older call": [ASK, {"role": "assistant", "function_call": {"name": "get", "arguments": {}}}, RESULT],
    "reasoning": [ASK, {**END, "reasoning_content": "Five."}, ASK],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
}


@pytest.mark.parametrize("tools", [None, [TOOL], [TOOL["function"]]], ids=["none", "one", "bare"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_prompt_is_that_of_the_row(
    name: str, tools: list[dict[str, Any]] | None, there: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    start = there.service.start

    def spy(served: ServedModel, prompts: list[list[int]], options: Any) -> Any:
        seen.extend(prompts)
        return start(served, prompts, options)

    monkeypatch.setattr(there.service, "start", spy)
    assert ask(there, CONVERSATIONS[name], tools=tools) == (200, "")
    [row] = parse([{"messages": [*CONVERSATIONS[name], END], "tools": tools}], "messages", ["x"])
    by = there.service.models.named["caller"].renderer
    assert seen == [by.prompt_ids(row)]
    assert isinstance(row.content, Chat)
    assert bool(row.content.tools) == bool(tools)


def test_no_tool_is_shown_where_none_may_be_called(there: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def count(**more: Any) -> int:
        body = {"model": "caller", "messages": [ASK], "max_tokens": 1, **more}
        return int(there.client.post("/v1/chat/completions", json=body).json()["usage"]["prompt_tokens"])

    assert count(tools=[TOOL]) == count(tools=[TOOL], tool_choice="auto") > count()
    assert count(tools=[TOOL], tool_choice="none") == count() == count(tools=[])


def test_reasoning_that_a_template_does_not_show_changes_nothing(there: Live) -> None:
    def count(answer: dict[str, Any]) -> int:
        body = {"model": "base", "messages": [ASK, answer, ASK], "max_tokens": 1}
        return int(there.client.post("/v1/chat/completions", json=body).json()["usage"]["prompt_tokens"])

    assert count({**END, "reasoning_content": "Five."}) == count(END)


NAMED = {"type": "function", "function": {"name": "get"}}
REFUSED: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "forced": (
        [ASK],
        {"tools": [TOOL], "tool_choice": "required"},
        "tool_choice: this server does not support it",
    ),
    "named": ([ASK], {"tools": [TOOL], "tool_choice": NAMED}, "tool_choice: this server does not support it"),
    "one at a time": ([ASK], {"tools": [TOOL], "parallel_tool_calls": False}, "does not limit calls"),
    "a tool without a name": ([ASK], {"tools": [{"type": "function"}]}, "`tools` has a tool without a name"),
    "a template without tools": ([ASK], {"tools": [TOOL], "model": "base"}, "does not show the tools"),
    "a call without a name": (
        [ASK, {**CALLED, "tool_calls": [{}]}, RESULT],
        {},
        "messages[1], field `tool_calls`",
    ),
    "a key of a call": (
        [ASK, {**CALLED, "tool_calls": [{**CALL, "x": 1}]}, RESULT],
        {},
        "has a call with `x`, which is not used",
    ),
    "the name of a user": (
        [{**ASK, "name": "Ann"}],
        {},
        "the prompt has no place for name of turns: remove it",
    ),
    "calls of a user": ([{**ASK, "tool_calls": [CALL]}], {}, "`tool_calls` is not used here"),
    "no question": ([ASK, CALLED], {}, "the last message must be the user's, or a tool's result"),
    "a result without content": ([ASK, CALLED, {"role": "tool"}], {}, "the role `tool` needs `content`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_prompt_has_no_place_for_is_refused_with_the_reason(name: str, there: Live) -> None:
    messages, more, words = REFUSED[name]
    status, message = ask(there, messages, **more)
    assert status == 400
    assert words in message
