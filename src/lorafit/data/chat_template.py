"""A model's Jinja chat template: rendered in a sandbox, with the content of each turn located in the text.

A second rendering, with placeholders as contents, gives the template's own text between the contents. The two texts
are then matched. A row that does not match exactly is refused.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date as Date
from typing import Literal

from lorafit.data.formats import Message
from lorafit.data.jinja_costs import OverdrawnError
from lorafit.data.jinja_filters import MAX_MESSAGE
from lorafit.data.jinja_sandbox import Sandbox
from lorafit.data.tokenizer import HOLE
from lorafit.errors import DataError, ModelError

MAX_CHARACTERS = 4_000_000
_MAX_KNOWN_SHAPES = 4096
_THINK, _END_THINK = "<think>\n", "\n</think>\n\n"
_NO_THOUGHT = re.compile(r"<think>\s*</think>\s*\Z")
_HOLE = re.compile(f"(?P<think>{_THINK}{HOLE}r{HOLE}\n</think>(?:\n\n)?)?{HOLE}(?P<turn>\\d+){HOLE}")

Kind = Literal["empty", "plain", "thinking"]
Shape = tuple[
    tuple[str, Kind], ...
]  # role and kind of content of every turn: everything on which a template may branch


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a rendered conversation: the content of a turn of `role`, or template text (None)."""

    text: str
    role: str | None


class ChatTemplate:
    """One chat template with its variables: the texts of BOS and EOS, and the date (YYYY-MM-DD)."""

    def __init__(self, source: str, *, bos: str | None, eos: str | None, date: str) -> None:
        """Raises ModelError with the line of a syntax error."""
        try:
            self._environment = Sandbox(Date.fromisoformat(date))
        except ValueError:
            raise ModelError("the date for the chat template is not a date", place="prompt.json") from None
        self._variables = {
            name: text for name, text in (("bos_token", bos), ("eos_token", eos)) if text is not None
        }
        self._shapes: dict[Shape, list[tuple[str, int | None, bool]]] = {}
        try:
            self._template = self._environment.from_string(source)
        except Exception as error:  # TemplateSyntaxError; a hostile template can break the compiler too
            place = f"chat template line {getattr(error, 'lineno', 1)}"
            raise ModelError(f"the chat template is not valid Jinja: {error}", place=place) from error

    def render(self, messages: Sequence[Message], *, ask: bool = False) -> str:
        """The conversation as text, as transformers' apply_chat_template renders it; `ask`: up to the next answer.

        Raises DataError with the template's own message, or with the line of the template that failed, and ModelError
        for a template that exceeds its budget of time or memory.
        """
        turns = [{"role": message.role, "content": message.content} for message in messages]
        self._environment.begin(sum(len(message.content) for message in messages))
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(
                messages=turns, add_generation_prompt=ask, tools=None, documents=None, **self._variables
            ):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_CHARACTERS:
                    raise OverdrawnError(f"it renders more than {MAX_CHARACTERS:,} characters")
        except Exception as error:  # a template is a program: it may raise anything
            line = self._line(error)
            place = f"chat template line {line}" if line else "chat template"
            if isinstance(error, OverdrawnError):  # a fault of the template, not of the row
                raise ModelError(f"the chat template is refused: {error}", place=place) from error
            hint = "change the conversation to what the template accepts, or give another with data.template"
            raise DataError(
                f"the chat template refuses the row: {str(error)[:MAX_MESSAGE]}", place=place, hint=hint
            ) from error
        return "".join(pieces)

    def _line(self, error: Exception) -> int | None:
        """The line of the template that raised `error`."""
        line, trace = None, error.__traceback__
        while trace:
            if trace.tb_frame.f_code.co_filename == "<template>":
                line = self._template.get_corresponding_lineno(trace.tb_lineno)
            trace = trace.tb_next
        return line

    def parts(self, messages: Sequence[Message]) -> list[Part]:
        """The rendered conversation cut into contents and template text; joined they are `render(messages)`.

        The template may strip blanks from a content and, from an assistant turn, its thinking. An empty thought that
        the template writes before an answer belongs to the answer, because the model must generate it, unless the
        generation prompt has it. Every assistant turn is there exactly once. Raises DataError when the template
        changes a content in any other way.
        """
        text = self.render(messages)
        holes = self._holes(messages)
        parts: list[Part] = []
        located: list[int] = []
        position = 0
        for index, (before, turn, with_thinking) in enumerate(holes):
            following = holes[index + 1][0] if index + 1 < len(holes) else ""
            if not text.startswith(before, position):
                raise self._lost(messages, turn)
            thought = ""
            if turn is not None and messages[turn].role == "assistant":
                thought = self._empty_thought(before)
                before = before[: len(before) - len(thought)]
                if with_thinking and self._asks_without_thought:
                    hint = "take the thinking out of the answer, or give a template that asks for it with data.template"
                    raise DataError(
                        f"turn {turn + 1} thinks, but the chat template asks without a thought", hint=hint
                    )
            parts.append(Part(before, None))
            position += len(before)
            if turn is None:
                break
            position += len(thought)
            forms = _forms(messages[turn].content, with_thinking)
            content = next((form for form in forms if text.startswith(form + following, position)), None)
            if content is None:
                raise self._lost(messages, turn)
            parts.append(Part(thought + content, messages[turn].role))
            located += [turn] if messages[turn].role == "assistant" else []
            position += len(content)
        answers = [turn for turn, message in enumerate(messages) if message.role == "assistant"]
        if position < len(text) or sorted(located) != answers:
            raise self._lost(messages, None)
        return [part for part in parts if part.text or part.role == "assistant"]

    def _holes(self, messages: Sequence[Message]) -> list[tuple[str, int | None, bool]]:
        """(template text, index of the turn after it, whether with thinking); the last without a turn."""
        shape: Shape = tuple((message.role, _kind(message)) for message in messages)
        if shape in self._shapes:
            return self._shapes[shape]
        text = self.render(
            [
                Message(message.role, _placeholder(turn, kind))
                for turn, (message, (_, kind)) in enumerate(zip(messages, shape, strict=True))
            ]
        )
        holes: list[tuple[str, int | None, bool]] = []
        position = 0
        for match in _HOLE.finditer(text):
            holes.append((text[position : match.start()], int(match["turn"]), match["think"] is not None))
            position = match.end()
        holes.append((text[position:], None, False))
        if len(self._shapes) < _MAX_KNOWN_SHAPES:
            self._shapes[shape] = holes
        return holes

    def _empty_thought(self, before: str) -> str:
        """The empty thought at the end of the template's text before an answer, if it belongs to the answer."""
        match = _NO_THOUGHT.search(before)
        return match.group() if match and not self._asks_without_thought else ""

    @functools.cached_property
    def _asks_without_thought(self) -> bool:
        """Whether the generation prompt itself ends in an empty thought."""
        try:
            return _NO_THOUGHT.search(self.render([Message("user", "question")], ask=True)) is not None
        except DataError:
            return False

    @staticmethod
    def _lost(messages: Sequence[Message], turn: int | None) -> DataError:
        which = f"turn {turn + 1} ({messages[turn].role})" if turn is not None else "every turn"
        hint = "remove the row, or give a template that keeps contents as they are with data.template"
        return DataError(f"{which} cannot be found exactly in what the chat template renders", hint=hint)


def _kind(message: Message) -> Kind:
    if not message.content:
        return "empty"
    return "thinking" if message.role == "assistant" and "</think>" in message.content else "plain"


def _placeholder(turn: int, kind: Kind) -> str:
    if kind == "empty":
        return ""
    hole = f"{HOLE}{turn}{HOLE}"
    return f"{_THINK}{HOLE}r{HOLE}\n</think>{hole}" if kind == "thinking" else hole


def _forms(content: str, with_thinking: bool) -> Iterable[str]:
    """The forms that a template may give a content, the unchanged one first."""
    yield from (content, content.lstrip("\n"), content.rstrip(), content.lstrip(), content.strip())
    if "</think>" in content:
        thinking, answer = content.rsplit("</think>", 1)
        if with_thinking:
            thinking = thinking.rsplit("<think>", 1)[-1].strip("\n")
            yield from (
                f"{_THINK}{thinking}{_END_THINK}{form}" for form in (answer.lstrip("\n"), answer.strip())
            )
        else:
            yield from (answer, answer.lstrip("\n"), answer.strip())
