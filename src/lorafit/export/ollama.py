"""Writes and checks the Modelfile of a folder for `ollama create`, from the prompt contract.

Ollama renders a conversation by a template in Go's syntax, and adds BOS itself. Messages with the role `system` are
joined as `.System` (https://github.com/ollama/ollama/blob/main/template/template.go). The template has the texts that
the exported chat template puts around the messages of a rendered conversation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from lorafit.data.formats import Chat, Message, Row
from lorafit.data.formats import Instruction as InstructionRow
from lorafit.data.prompt import Renderer
from lorafit.errors import DataError, ModelError
from lorafit.export.chat_template import chat_template, render
from lorafit.export.reference import Question
from lorafit.export.run_source import RunSource

FILE, MODEL = "Modelfile", "model.gguf"
_SYSTEM, _ANSWER = "the-system-prompt", "the-answer"
_TALK = ("the-question", _ANSWER, "second-question", "second-answer", "third-question")
_QUOTES = '"""'
_BRACES_OR_QUOTES = re.compile(
    r'\{{2,}|\{(?="""|\Z)|"""'
)  # what begins an action, alone or with one that follows
_ACTION = re.compile(r"\{\{ (.*?) \}\}", re.DOTALL)
_IS_LAST = "eq (len (slice $.Messages $i)) 1"
_EACH = "range $i, $_ := .Messages"


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
    """The template of a conversation. Raises ModelError if the chat template has no counterpart in Go's syntax."""
    opening, asked, answered, *later, end = _around(renderer, _TALK)
    if later != [asked, answered]:
        raise ModelError("the chat template writes later turns otherwise: Ollama has no counterpart of it")
    opening = to_go_template(opening)
    try:
        before, between, *same = _around(renderer, _TALK, system=True)
        if same == [asked, answered, *later, end]:
            with_system = f"{to_go_template(before)}{{{{ .System }}}}{to_go_template(between)}"
            opening = f"{{{{ if .System }}}}{with_system}{{{{ else }}}}{opening}{{{{ end }}}}"
    except DataError:  # the chat template has no system prompt
        pass
    asked, answered, end = map(to_go_template, (asked, answered, end))
    if end != asked:
        asked = f"{{{{ if {_IS_LAST} }}}}{end}{{{{ else }}}}{asked}{{{{ end }}}}"
    answered = f"{{{{ if {_IS_LAST} }}}}{{{{ else }}}}{answered}{{{{ end }}}}"
    return (
        f'{opening}{{{{ {_EACH} }}}}{{{{ if eq .Role "user" }}}}{{{{ .Content }}}}{asked}'
        f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{answered}{{{{ end }}}}{{{{ end }}}}'
    )


def check_modelfile(source: RunSource, prompts: Sequence[Question], folder: Path) -> list[str]:
    """Each difference of the written Modelfile from the contract: stop tokens, prompts, and one conversation of all
    prompts, turn by turn.
    """
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
    first = [Message("system", system[2])] if system else []
    bos = (source.contract.bos or "") if source.contract.add_bos else ""
    for number, prompt in enumerate(prompts, 1):
        text = bos + render_go(template[1], [*first, *prompt.messages])
        if text != prompt.text:
            faults.append(f"prompt {number} is rendered otherwise by the Modelfile: {text!r}")
    talk: list[Message] = []
    for turn, prompt in enumerate(prompts, 1):
        talk += prompt.messages
        try:
            expected = render(source.renderer, chat_template(source.renderer), talk)
        except DataError:  # it was trained for one turn alone
            break
        text = bos + render_go(template[1], [*first, *talk])
        if turn > 1 and text != expected:
            faults.append(f"turn {turn} of a conversation is rendered otherwise by the Modelfile: {text!r}")
            break
        talk.append(Message("assistant", _ANSWER))
    return faults


def render_go(template: str, messages: Sequence[Message]) -> str:
    """The text that Ollama renders of a conversation, by the few actions that `go_template` writes."""
    system = "\n\n".join(message.content for message in messages if message.role == "system")
    return _block(_ACTION.split(template), 0, messages, {".System": system, "else": True})[0]


def _block(
    parts: Sequence[str], at: int, messages: Sequence[Message], values: Mapping[str, str | bool]
) -> tuple[str, int]:
    """(the text of the block that begins at part `at`, the part of its `else` or `end`): odd parts are actions."""
    text = parts[at]
    while at + 1 < len(parts) and not (action := parts[at + 1]).startswith(("else", "end")):
        at += 2
        if action.startswith("if "):
            branches = []
            while action != "end":
                inner, end = _block(parts, at, messages, values)
                branches += [inner] * bool(values[action.removeprefix("else ").removeprefix("if ")])
                action, at = parts[end], end + 1
            text += branches[0] if branches else ""
        elif action == _EACH:
            for number, message in enumerate(messages, 1):
                own = {f'eq .Role "{role}"': message.role == role for role in ("user", "assistant")}
                is_last = {_IS_LAST: number == len(messages)}
                inner, end = _block(
                    parts, at, messages, {**values, **own, **is_last, ".Content": message.content}
                )
                text += inner
            at = end + 1
        else:
            text += str(values[action]) if action in values else json.loads(action)
        text += parts[at]
    return text, at + 1


def _around(renderer: Renderer, texts: Sequence[str], *, system: bool = False) -> list[str]:
    """What the exported chat template puts before each message of a conversation, and after the last one.

    BOS is left out, which Ollama adds. A template of one turn is continued with another such turn.
    """
    talk = [Message("assistant" if at % 2 else "user", text) for at, text in enumerate(texts)]
    if system:
        talk.insert(0, Message("system", _SYSTEM))
    try:
        rest = render(renderer, chat_template(renderer), talk)
    except DataError:
        if len(texts) == 1:
            raise
        *before, asked = _around(renderer, texts[:1], system=system)
        answered = _cut(_answered(renderer), _ANSWER)[1] + before[0]
        return [*before, asked, answered, asked, answered, asked]
    if renderer.contract.add_bos:
        rest = rest.removeprefix(renderer.contract.bos or "")
    parts = []
    for message in talk:
        before_it, rest = _cut(rest, message.content)
        parts.append(before_it)
    return [*parts, rest]


def _answered(renderer: Renderer) -> str:
    """A whole turn, question and answer, as in training."""
    content = (
        Chat((Message("user", _TALK[0]), Message("assistant", _ANSWER)))
        if renderer.contract.template == "chat"
        else InstructionRow(_TALK[0], "", _ANSWER)
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
