"""The prompt contract for other programs: a chat template that renders, byte for byte, what was trained on.

Other programs know nothing of lorafit's rules: they render a Jinja template and tokenise the text. So what those
rules do around the model's own template (BOS, the run's system prompt, the fixed date, what stands between the last
question and the answer) is written into the template that is exported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import date as Date

from lorafit.data.chat_template import ChatTemplate
from lorafit.data.formats import Message
from lorafit.data.prompt import Renderer
from lorafit.errors import ModelError

QUESTION = "Say something."
_NOW = re.compile(r"strftime_now\(\s*(['\"])([^'\"]*)\1\s*\)")


def written_prompt(renderer: Renderer, messages: Sequence[Message]) -> str:
    """The text that a program must render and tokenise, control tokens parsed, to get `renderer`'s ids."""
    bos, text = renderer.prompt_text(messages)
    return bos + _blank(renderer) * bool(bos) + text


def chat_template(renderer: Renderer) -> str:
    """The Jinja source that renders `written_prompt` in transformers, llama.cpp and what is built on them.

    Raises ModelError where the model's own template cannot be brought to it.
    """
    bos, _ = renderer.prompt_text([Message("user", QUESTION)])
    head = "{{- bos_token }}" if bos else ""
    if bos and _blank(renderer):
        head = "{{- bos_token + ' ' }}"
    if renderer.contract.template != "chat":
        return _single_turn(renderer, head)
    source = renderer.contract.chat_template or ""
    date = Date.fromisoformat(renderer.contract.date)
    source = _NOW.sub(lambda match: json.dumps(date.strftime(match[2])), source).removesuffix("\n")
    if renderer.contract.system:
        begin = head or "{{- '' }}"  # a newline after a block's end would be taken from the model's own text
        head = (
            "{%- if messages[0]['role'] != 'system' %}{%- set messages = [{'role': 'system', 'content': "
            f"{_literal(renderer.contract.system)}}}] + messages %}}{{%- endif %}}{begin}"
        )
    return _ended_as_trained(renderer, head + source)


def render(renderer: Renderer, source: str, messages: Sequence[Message]) -> str:
    """What a program makes of the template `source` for a conversation that waits for an answer."""
    contract = renderer.contract
    template = ChatTemplate(source, bos=contract.bos, eos=contract.eos, date=contract.date)
    return template.render(messages, ask=True)


def _blank(renderer: Renderer) -> str:
    """The blank before a text that is put after BOS, where the tokenizer would put it before the text's start only.

    transformers and llama.cpp put none there, or one after each control token, so it is written out.
    """
    return " " if renderer.tokenizer.blank == "first" else ""


def _single_turn(renderer: Renderer, head: str) -> str:
    """The alpaca and classic templates; a further turn follows the one before, though none was trained."""
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


def _ended_as_trained(renderer: Renderer, source: str) -> str:
    """`source` with what training had between question and answer, and the template's own prompt lacks."""
    messages = [Message("user", QUESTION)]
    wanted, rendered = written_prompt(renderer, messages), render(renderer, source, messages)
    if rendered == wanted:
        return source
    if wanted.startswith(rendered):
        missing = _literal(wanted[len(rendered) :])
        return f"{source}{{{{ {missing} if add_generation_prompt else '' }}}}"
    if rendered.rstrip(" ") == wanted:  # a blank that tokenizers join to the answer
        return (
            f"{{%- set rendered %}}{source}{{%- endset %}}"
            "{{- rendered.rstrip(' ') if add_generation_prompt else rendered }}"
        )
    raise ModelError(
        "the chat template renders another prompt for answering than it did in training",
        place="prompt.json",
        hint=f"for answering: {rendered[-60:]!r}, in training: {wanted[-60:]!r}; train with a template that agrees",
    )


def _literal(text: str) -> str:
    """A text as a string of Jinja."""
    return json.dumps(text, ensure_ascii=False)
