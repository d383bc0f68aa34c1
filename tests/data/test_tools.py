"""Calls, tools and reasoning in chat templates: rendered as Jinja renders them; only what is said is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tests.data.contents import make
from tests.data.masks import trained_stretches
from tests.data.toy_tokenizers import CHATML, QWEN_3, hostile_text, qwen_like
from tokenizers import normalizers

from lorafit.data.chat_template import ChatTemplate
from lorafit.data.formats import Chat, Message, parse
from lorafit.data.prompt import Rendered, Renderer
from lorafit.data.tokenizer import Tokenizer
from lorafit.errors import DataError, ModelError

# Calls as tagged JSON after the content; thinking in the answers after the last question only.
HERMES = (
    "{%- if tools %}{{- '<|im_start|>system\\n<tools>' }}{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}"
    "{%- endfor %}{{- '</tools><|im_end|>\\n' }}{%- endif %}{%- set ns = namespace(last=0) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- set content = m.content if m.content is string else '' %}"
    "{%- if m.role == 'tool' %}{{- '<|im_start|>user\\n<tool_response>\\n' + content }}"
    "{{- '\\n</tool_response><|im_end|>\\n' }}"
    "{%- elif m.role == 'assistant' %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if loop.index0 > ns.last and m.reasoning_content is string %}"
    "{{- '<think>\\n' + m.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}"
    "{%- elif loop.last and enable_thinking is defined and not enable_thinking %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{{- content }}"
    "{%- for call in m.tool_calls or [] %}"
    '{{- \'\\n<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}"
    "{{- '}\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
# One call as bare JSON instead of the content; a result is JSON text of its own.
LLAMA_31 = (
    "{%- if tools %}{{- '<|im_start|>system\\n' }}{%- for tool in tools %}{{- tool | tojson(indent=4) }}{%- endfor %}"
    "{{- '<|im_end|>' }}{%- endif %}{%- for m in messages %}{%- if m.tool_calls %}"
    "{%- if m.tool_calls | length != 1 %}{{- raise_exception('one call at a time') }}{%- endif %}"
    "{%- set call = m.tool_calls[0].function %}{{- '<|im_start|>assistant\\n\\n{\"name\": \"' + call.name + '\", ' }}"
    "{{- '\"parameters\": ' + (call.arguments | tojson) + '}<|im_end|>' }}"
    "{%- elif m.role == 'tool' %}{{- '<|im_start|>ipython\\n\\n' + (m.content | tojson) + '<|im_end|>' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\\n\\n' + m.content + '<|im_end|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n\\n' }}{%- endif %}"
)
# No generation prompt; calls are a list with their ids; tools stand before the last question.
MISTRAL = (
    "{%- set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- if tools and m == asked[-1] %}"
    "{{- '[TOOLS]' + (tools | tojson) + '[/TOOLS]' }}{%- endif %}{{- '[INST] ' + m.content + '[/INST]' }}"
    "{%- elif m.tool_calls %}{{- '[TOOL_CALLS] [' }}{%- for call in m.tool_calls %}"
    "{%- set out = call.function | tojson %}{{- out[:-1] + ', \"id\": \"' + call.id + '\"}' }}"
    "{{- ', ' if not loop.last else ']<|endoftext|>' }}{%- endfor %}"
    "{%- elif m.role == 'tool' %}{{- '[RESULTS] {\"content\": ' + m.content }}"
    "{{- ', \"id\": \"' + m.tool_call_id + '\"}[/RESULTS]' }}"
    "{%- else %}{{- ' ' + m.content + '<|endoftext|>' }}{%- endif %}{%- endfor %}"
)
TEMPLATES = {"hermes": HERMES, "llama 3.1": LLAMA_31, "mistral": MISTRAL}
NFC = normalizers.NFC().normalize_str  # what the tokenizer does to a text
TOOLS = [
    {
        "type": "function",
        "function": {"name": "get", "description": "Ends in <|im_end|>", "parameters": {"a": 1}},
    }
]


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Renderer]:
    made: dict[str, Tokenizer] = {}

    def of(source: str, **options: Any) -> Renderer:
        if source not in made:
            folder = tmp_path_factory.mktemp("tools")
            made[source] = Tokenizer.from_folder(qwen_like(folder / "model", source))
        return make(made[source], max_length=10**6, **options)

    return of


def reference(source: str, messages: list[dict[str, Any]], tools: Any = None, **variables: Any) -> str:
    """The template as any other Jinja renders it."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    template = environment.from_string(source)
    variables |= {"bos_token": "", "eos_token": "<|im_end|>"}
    return template.render(messages=messages, tools=tools, add_generation_prompt=False, **variables)


def rendered(by: Renderer, row: dict[str, Any]) -> tuple[str, list[str]]:
    """(text of a row of messages, its trained stretches)."""
    [parsed] = parse([row], "messages", ["x.jsonl row 1"])
    [outcome] = by.render_batch([parsed])
    if not isinstance(outcome, Rendered):
        raise DataError(outcome.reason if hasattr(outcome, "reason") else outcome.message)
    prompt = by.prompt_ids(parsed)
    assert outcome.ids[: len(prompt)] == prompt, "generation begins with other ids"
    return "".join(span.text for span in by.text(parsed)), trained_stretches(by.tokenizer, outcome)[0]


def call(arguments: Any, name: str = "get") -> dict[str, Any]:
    return {"id": "abcdefghi", "type": "function", "function": {"name": name, "arguments": arguments}}


ASK = {"role": "user", "content": "What is it?"}
END = {"role": "assistant", "content": "It is 5."}


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=25)
@given(key=hostile_text, value=hostile_text, result=hostile_text, as_text=st.booleans())
def test_calls_are_trained_and_results_are_not(
    renderer: Callable[..., Renderer], name: str, key: str, value: str, result: str, as_text: bool
) -> None:
    arguments = {key: value, "n": [1, None, True]}
    told = call(json.dumps(arguments) if as_text else arguments)
    turns = [
        ASK,
        {"role": "assistant", "content": None, "tool_calls": [told]},
        {"role": "tool", "content": result, "tool_call_id": "abcdefghi"},
        END,
    ]
    text, trained = rendered(renderer(TEMPLATES[name]), {"messages": turns, "tools": TOOLS})
    turns[1] = {"role": "assistant", "content": None, "tool_calls": [call(arguments)]}
    whole = reference(TEMPLATES[name], turns, TOOLS)
    assert text.removesuffix("<|im_end|>") in (whole, whole.removesuffix("<|im_end|>"))
    shown = json.dumps(arguments, ensure_ascii=False)
    said = {
        "hermes": [
            f'\n<tool_call>\n{{"name": "get", "arguments": {shown}}}\n</tool_call><|im_end|>',
            "It is 5.<|im_end|>",
        ],
        "llama 3.1": [f'{{"name": "get", "parameters": {shown}}}<|im_end|>', "It is 5.<|im_end|>"],
        "mistral": [
            f'[TOOL_CALLS] [{{"name": "get", "arguments": {shown}, "id": "abcdefghi"}}]<|endoftext|>',
            " It is 5.<|endoftext|>",
        ],
    }  # fmt: skip
    assert trained == [NFC(text) for text in said[name]]


def test_several_calls_beside_a_content(renderer: Callable[..., Renderer]) -> None:
    turns = [
        ASK,
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call("{}"), call({"a": 1}, "put")]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": ""},
        {"role": "assistant", "tool_calls": [call({})]},
    ]
    _, trained = rendered(renderer(HERMES), {"messages": turns, "tools": TOOLS})
    assert trained[0].startswith("Let me see.\n<tool_call>")
    assert trained[0].count("</tool_call>") == 2
    assert trained[1] == '\n<tool_call>\n{"name": "get", "arguments": {}}\n</tool_call><|im_end|>'


def test_a_call_that_is_not_trained(renderer: Callable[..., Renderer]) -> None:
    turns = [
        ASK,
        {"role": "assistant", "tool_calls": [call({})], "weight": 0},
        {"role": "tool", "content": "1"},
        END,
    ]
    _, trained = rendered(renderer(HERMES), {"messages": turns})
    assert trained == ["It is 5.<|im_end|>"]
    _, trained = rendered(renderer(HERMES, train_on="last"), {"messages": [*turns[:1], {**END}, *turns]})
    assert trained == ["It is 5.<|im_end|>"]


def test_arguments_that_are_no_json_are_passed_as_text(renderer: Callable[..., Renderer]) -> None:
    turns = [
        ASK,
        {"role": "assistant", "tool_calls": [call("{broken")]},
        {"role": "tool", "content": "1"},
        END,
    ]
    _, trained = rendered(renderer(HERMES), {"messages": turns})
    assert trained[0] == '\n<tool_call>\n{"name": "get", "arguments": {broken}\n</tool_call><|im_end|>'


@pytest.mark.parametrize(
    ("source", "row", "message"),
    [
        (CHATML, {"messages": [ASK, END], "tools": TOOLS}, "does not show the tools of the row"),
        (CHATML, {"messages": [ASK, {"role": "assistant", "tool_calls": [call({})]}]}, "does not show the calls"),
        (CHATML, {"messages": [ASK, {**END, "reasoning": "x"}]}, "does not show the reasoning"),
        (LLAMA_31, {"messages": [ASK, {**END, "tool_calls": [call({})]}]}, "does not show the assistant turn 2|found"),
        (LLAMA_31, {"messages": [ASK, {"role": "assistant", "tool_calls": [call({}), call({})]}]}, "one call at a"),
    ],
)  # fmt: skip
def test_what_a_template_drops_is_refused(
    renderer: Callable[..., Renderer], source: str, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        rendered(renderer(source), row)


def test_a_turn_that_a_template_drops_is_refused(renderer: Callable[..., Renderer]) -> None:
    source = CHATML.replace(
        "for message in messages", "for message in messages if message['role'] != 'system'"
    )
    with pytest.raises(DataError, match="does not show the system turn 1"):
        rendered(renderer(source), {"messages": [{"role": "system", "content": "s"}, ASK, END]})


@settings(max_examples=25)
@given(first=hostile_text, second=hostile_text)
def test_reasoning_reaches_the_template(renderer: Callable[..., Renderer], first: str, second: str) -> None:
    """That of an earlier answer is dropped as the template says; that of the last one is trained with its tags."""
    turns = [ASK, {**END, "reasoning_content": first}, ASK, {**END, "reasoning_content": second}]
    text, trained = rendered(renderer(HERMES), {"messages": turns})
    expected = [{key: value for key, value in turn.items() if value != ""} for turn in turns]
    assert text == reference(HERMES, expected)
    thought = f"<think>\n{second.strip(chr(10))}\n</think>\n\n" if second else ""
    assert trained == ["It is 5.<|im_end|>", NFC(f"{thought}It is 5.<|im_end|>")]


def test_a_thought_after_an_empty_one_is_refused(tmp_path: Path) -> None:
    """A template that takes thoughts from `reasoning_content` alone writes an empty one before that of a content."""
    source = (
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}{%- if m.role == 'assistant' %}"
        "{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{%- endif %}"
        "{{- m.content + '<|im_end|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
    )
    template = ChatTemplate(source, bos=None, eos=None, date="2024-07-26")
    asked = Message("user", "a")
    with pytest.raises(DataError, match="empty thought before the one in the content of turn 2"):
        template.parts([asked, Message("assistant", "<think>\nI muse.\n</think>\n\nb")])
    told = template.parts([asked, Message("assistant", "b", reasoning="I muse.")])
    assert "<think>\nI muse.\n</think>\n\nb" in "".join(part.text for part in told)


def test_reasoning_where_the_template_reads_it_in_the_content(renderer: Callable[..., Renderer]) -> None:
    turns = [ASK, {**END, "thinking": "Hm."}, ASK, {**END, "thinking": "Five."}]
    _, trained = rendered(renderer(QWEN_3), {"messages": turns})
    assert trained == ["It is 5.<|im_end|>", "<think>\nFive.\n</think>\n\nIt is 5.<|im_end|>"]


def test_arguments_of_the_template(renderer: Callable[..., Renderer]) -> None:
    """They decide the prompt, in training and later; one that the template does not read is refused."""
    by = renderer(HERMES, template_args={"enable_thinking": False})
    assert json.loads(json.dumps(by.contract.to_json()))["template_args"] == {"enable_thinking": False}
    assert type(by.contract).from_json(by.contract.to_json()) == by.contract
    assert by.contract.hash != renderer(HERMES).contract.hash
    assert by.contract.jinja(by.tokenizer).render([Message("user", "x")], ask=True).endswith("</think>\n\n")  # type: ignore[union-attr]
    with pytest.raises(DataError, match="turn 2 thinks, but the chat template asks without a thought"):
        rendered(by, {"messages": [ASK, {**END, "reasoning": "x"}]})
    with pytest.raises(ModelError, match="reads no `enable_thinkin`") as caught:
        renderer(HERMES, template_args={"enable_thinkin": False})
    assert "`enable_thinking`" in caught.value.problems[0].hint


def test_a_contract_without_the_new_settings_is_as_it_was(renderer: Callable[..., Renderer]) -> None:
    written = renderer(CHATML).contract.to_json()
    assert not {"template_args", "parse_special"} & set(written)


def test_prompts_with_tools(renderer: Callable[..., Renderer]) -> None:
    """A conversation that ends in a result is answered; plain objects are turns too."""
    by = renderer(HERMES)
    turns = [ASK, {"role": "assistant", "tool_calls": [call({})]}, {"role": "tool", "content": "5"}]
    [row] = parse([{"messages": [*turns, END], "tools": TOOLS}], "messages", ["x"])
    assert isinstance(row.content, Chat)
    assert by.prompt_ids(Chat(row.content.messages[:-1], row.content.tools)) == by.prompt_ids(row)
    assert by.prompt_ids([ASK]) == by.prompt_ids([Message("user", "What is it?")])
    for wrong in ([{"role": "user"}], [3], [{"content": "x"}], "text", 3):
        with pytest.raises(DataError):
            by.prompt_ids(wrong)  # type: ignore[arg-type]


def test_no_template_of_a_model_folder_is_needed_to_say_what_a_row_lacks(tmp_path: Path) -> None:
    by = make(Tokenizer.from_folder(qwen_like(tmp_path / "model", CHATML)), "alpaca")
    with pytest.raises(DataError, match="no conversations"):
        rendered(by, {"messages": [ASK, END], "tools": TOOLS})
