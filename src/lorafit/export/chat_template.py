"""The prompt contract for other programs: a chat template that renders the prompts of the training, byte for byte.

Other programs render a Jinja template and tokenise the text; they do not have lorafit's rules. So the exported template
contains what those rules add to the model's own one: BOS, the run's system prompt, the fixed date, and the text
between the last question and the answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import date as Date

from lorafit.data.chat_template import ChatTemplate
from lorafit.data.contract import RAW
from lorafit.data.formats import Message
from lorafit.data.prompt import Renderer
from lorafit.errors import ModelError

QUESTION = "Say something."
WRITTEN_BOS = "{{- bos_token }}"
_NOW = re.compile(r"strftime_now\(\s*(['\"])([^'\"]*)\1\s*\)")


def written_prompt(renderer: Renderer, messages: Sequence[Message]) -> str:
    """The text that a program must render and tokenise, with control tokens parsed, to get `renderer`'s ids."""
    bos, text = renderer.prompt_text(messages)
    return bos + _blank(renderer) * bool(bos) + text


def chat_template(renderer: Renderer) -> str:
    """The Jinja source that renders `written_prompt` in transformers, llama.cpp and what is built on them.

    Raises ModelError if the model's own template cannot be changed to do so.
    """
    bos, _ = renderer.prompt_text([Message("user", QUESTION)])
    head = WRITTEN_BOS if bos else ""
    if bos and _blank(renderer):
        head = "{{- bos_token + ' ' }}"
    if renderer.contract.template == RAW:
        return _raw(renderer, head)
    if renderer.contract.template != "chat":
        return _single_turn(renderer, head)
    source = renderer.contract.chat_template or ""
    date = Date.fromisoformat(renderer.contract.date)
    source = _NOW.sub(lambda match: json.dumps(date.strftime(match[2])), source).removesuffix("\n")
    if renderer.contract.system:
        begin = head or "{{- '' }}"  # else a block's end would remove a newline of the model's own text
        head = (
            "{%- if messages[0]['role'] != 'system' %}{%- set messages = [{'role': 'system', 'content': "
            f"{_literal(renderer.contract.system)}}}] + messages %}}{{%- endif %}}{begin}"
        )
    given = "".join(
        f"{{%- set {name} = {_literal(value)} %}}" for name, value in renderer.contract.template_args.items()
    )
    if given and not head:
        head = "{{- '' }}"  # else the end of a block would remove a newline of the model's own text
    return _ended_as_trained(renderer, given + head + source)


def render(renderer: Renderer, source: str, messages: Sequence[Message]) -> str:
    """The prompt that a program renders with the template `source`, up to the answer."""
    contract = renderer.contract
    template = ChatTemplate(
        source,
        bos=contract.bos,
        eos=contract.eos,
        date=contract.date,
        arguments=renderer.tokenizer.named,
    )
    return template.render(messages, ask=True)


def _blank(renderer: Renderer) -> str:
    """The blank between BOS and a text, if the tokenizer adds one at the start of a text only.

    transformers and llama.cpp add none there, or one after each control token, so the template contains it.
    """
    return " " if renderer.tokenizer.blank == "first" else ""


def _single_turn(renderer: Renderer, head: str) -> str:
    """The alpaca and classic templates; further turns follow, though none was trained."""
    _, text = renderer.prompt_text([Message("user", QUESTION)])
    preamble = text[: text.index("### Instruction:\n")].removesuffix("\n\n")
    eos = " + eos_token" if renderer.contract.eos else ""
    return (
        f"{head}{{%- if messages[0]['role'] == 'system' %}}{{%- set preamble = messages[0]['content'] %}}{{%- else %}}"
        f"{{%- set preamble = {_literal(preamble)} %}}{{%- endif %}}"
        r"{%- if preamble %}{{- preamble + '\n\n' }}{%- endif %}"
        r"{%- for message in messages %}{%- if message['role'] == 'user' %}"
        r"{{- '### Instruction:\n' + message['content'] + '\n\n### Response:\n' }}"
        r"{%- elif message['role'] == 'assistant' %}"
        rf"{{{{- message['content']{eos} + '\n\n' }}}}{{%- endif %}}{{%- endfor %}}"
    )


def _raw(renderer: Renderer, head: str) -> str:
    """No template: a prompt is one text. Further turns are refused, because no row had any."""
    eos = " + eos_token" if renderer.contract.eos else ""
    return (
        f"{head}{{%- for message in messages %}}"
        "{%- if message['role'] == 'user' and loop.first %}{{- message['content'] }}"
        f"{{%- elif message['role'] == 'assistant' and loop.index == 2 %}}{{{{- message['content']{eos} }}}}"
        "{%- else %}{{- raise_exception('this model was trained without a template: give one user message') }}"
        "{%- endif %}{%- endfor %}"
    )


def _ended_as_trained(renderer: Renderer, source: str) -> str:
    """`source` with the text that training had between question and answer, if the template's prompt lacks it."""
    messages = [Message("user", QUESTION)]
    trained, rendered = written_prompt(renderer, messages), render(renderer, source, messages)
    if rendered == trained:
        return source
    if trained.startswith(rendered):
        missing = _literal(trained[len(rendered) :])
        return f"{source}{{{{ {missing} if add_generation_prompt else '' }}}}"
    if rendered.rstrip(" ") == trained:  # a blank that tokenizers join to the answer
        return (
            f"{{%- set rendered %}}{source}{{%- endset %}}"
            "{{- rendered.rstrip(' ') if add_generation_prompt else rendered }}"
        )
    raise ModelError(
        "the chat template renders another prompt for answering than it did in training",
        place="prompt.json",
        hint=f"for answering: {rendered[-60:]!r}, in training: {trained[-60:]!r}; use a template that agrees",
    )


def _literal(value: str | bool | int | float) -> str:
    """A value as a Jinja literal."""
    return json.dumps(value, ensure_ascii=False)
