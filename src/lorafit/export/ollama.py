"""Writes and checks the Modelfile of a folder for `ollama create`, from the prompt contract.

Ollama renders prompts by a template in Go's syntax, and adds BOS itself. The template is a rendered turn of the
contract in which actions replace the system prompt, the question and the answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from lorafit.data.formats import Chat, Message, Row
from lorafit.data.formats import Instruction as InstructionRow
from lorafit.data.prompt import Renderer
from lorafit.errors import DataError, ModelError
from lorafit.export.chat_template import written_prompt
from lorafit.export.reference import Question
from lorafit.export.run_source import RunSource

FILE, MODEL = "Modelfile", "model.gguf"
_SYSTEM, _QUESTION, _ANSWER = "the-system-prompt", "the-question", "the-answer"
_QUOTES = '"""'
_BRACES_OR_QUOTES = re.compile(
    r'\{{2,}|\{(?="""|\Z)|"""'
)  # what begins an action, alone or with one that follows
_ACTION = re.compile(r"\{\{ (.*?) \}\}", re.DOTALL)
_CONDITION = re.compile(r"\{\{ if \.System \}\}(.*?)\{\{ else \}\}(.*?)\{\{ end \}\}", re.DOTALL)


def write_modelfile(source: RunSource, staging: Path) -> None:
    """Write the Modelfile. Raises OSError, and ModelError if a prompt cannot be split at its question."""
    renderer, contract = source.renderer, source.contract
    lines = [f"FROM ./{MODEL}", f"TEMPLATE {_QUOTES}{go_template(renderer)}{_QUOTES}"]
    if contract.system and _QUOTES not in contract.system and not contract.system.endswith('"'):
        lines.append(f"SYSTEM {quoted(contract.system)}")
    for token in contract.stop_ids:
        lines.append(f"PARAMETER stop {quoted(renderer.tokenizer.decode([token]))}")
    (staging / FILE).write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def go_template(renderer: Renderer) -> str:
    """The template of one turn; Ollama concatenates turns."""
    before, end = _cut(_prompt(renderer, [Message("user", _QUESTION)]), _QUESTION)
    opening = to_go_template(before)
    try:
        prompt = _prompt(renderer, [Message("system", _SYSTEM), Message("user", _QUESTION)])
        before_system, rest = _cut(prompt, _SYSTEM)
        between, same_end = _cut(rest, _QUESTION)
        if same_end == end:
            with_system = f"{to_go_template(before_system)}{{{{ .System }}}}{to_go_template(between)}"
            opening = f"{{{{ if .System }}}}{with_system}{{{{ else }}}}{opening}{{{{ end }}}}"
    except DataError:  # the chat template has no system prompt
        pass
    _, closing = _cut(_answered(renderer), _ANSWER)
    return f"{opening}{{{{ .Prompt }}}}{to_go_template(end)}{{{{ .Response }}}}{to_go_template(closing)}"


def check_modelfile(source: RunSource, prompts: Sequence[Question], folder: Path) -> list[str]:
    """Each difference of the written Modelfile from the contract: rendered prompts and stop tokens."""
    text = (folder / FILE).read_text(encoding="utf-8")
    template = re.search(r'^TEMPLATE """(.*?)"""$', text, re.MULTILINE | re.DOTALL)
    system = re.search(r'^SYSTEM ("""|")(.*?)\1$', text, re.MULTILINE | re.DOTALL)
    if template is None:
        return ["the Modelfile has no template"]
    faults = []
    stops = [
        stop for _, stop in re.findall(r'^PARAMETER stop ("""|")(.*?)\1$', text, re.MULTILINE | re.DOTALL)
    ]
    for token in source.contract.stop_ids:
        if (name := source.renderer.tokenizer.decode([token])) not in stops:
            faults.append(f"the stop token {name!r} is not among the Modelfile's")
    bos = (source.contract.bos or "") if source.contract.add_bos else ""
    for number, prompt in enumerate(prompts, 1):
        question = prompt.messages[-1].content
        text = bos + render_go(template[1], system[2] if system else "", question)
        if text != prompt.text:
            faults.append(f"prompt {number} is rendered otherwise by the Modelfile: {text!r}")
    return faults


def render_go(template: str, system: str, question: str) -> str:
    """The prompt that Ollama renders of a question, up to the answer: the few actions that `go_template` writes."""
    template = _CONDITION.sub(
        lambda match: match[1 if system else 2], template.partition("{{ .Response }}")[0]
    )
    values = {".System": system, ".Prompt": question}
    return _ACTION.sub(
        lambda match: values[match[1]] if match[1] in values else json.loads(match[1]), template
    )


def _prompt(renderer: Renderer, messages: Sequence[Message]) -> str:
    """The written prompt without the BOS that Ollama adds."""
    text = written_prompt(renderer, messages)
    return text.removeprefix(renderer.contract.bos or "") if renderer.contract.add_bos else text


def _answered(renderer: Renderer) -> str:
    """A whole turn, question and answer, as in training."""
    content = (
        Chat((Message("user", _QUESTION), Message("assistant", _ANSWER)))
        if renderer.contract.template == "chat"
        else InstructionRow(_QUESTION, "", _ANSWER)
    )
    return "".join(span.text for span in renderer.text(Row(0, "", content)))


def _cut(text: str, hole: str) -> tuple[str, str]:
    if text.count(hole) != 1:
        raise ModelError("the chat template does not show each message once: Ollama has no counterpart of it")
    before, _, after = text.partition(hole)
    return before, after


def quoted(text: str) -> str:
    """A value of the Modelfile, which has no escapes. Raises ModelError for a text that cannot be written."""
    if '"' not in text and "\n" not in text:
        return f'"{text}"'
    if _QUOTES in text or text.endswith('"'):
        raise ModelError(f"a Modelfile cannot hold the text {text!r}", hint="export `gguf`")
    return f"{_QUOTES}{text}{_QUOTES}"


def to_go_template(text: str) -> str:
    """Text escaped for Go's template language and for the Modelfile; another action may follow it."""
    return _BRACES_OR_QUOTES.sub(lambda match: f"{{{{ {json.dumps(match[0])} }}}}", text)
