"""A model's Jinja chat template: rendered in a sandbox, with the content of each turn located in the text.

A second rendering, with placeholders as contents, gives the template's own text between the contents. The two texts
are then matched. A row that does not match exactly is refused.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date as Date
from typing import Any, Literal

from jinja2 import meta

from lorafit.data.content import Message
from lorafit.data.jinja_costs import OverdrawnError
from lorafit.data.jinja_filters import MAX_MESSAGE
from lorafit.data.jinja_sandbox import Sandbox
from lorafit.data.row_fields import REASONING
from lorafit.data.tokenizer import HOLE
from lorafit.errors import DataError, ModelError

MAX_CHARACTERS = 4_000_000
_MAX_KNOWN_SHAPES = 4096
_THINK, _END_THINK = "<think>\n", "\n</think>\n\n"
_NO_THOUGHT = re.compile(r"<think>\s*</think>\s*\Z")
_HOLE = re.compile(
    f"(?P<think>{_THINK}{HOLE}r{HOLE}\n</think>(?:\n\n)?)?{HOLE}(?P<turn>\\d+)(?P<reasoning>r?){HOLE}"
)
_STANDARD = {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"}
_ANSWER = Message("assistant", "answer")

Kind = Literal["empty", "plain", "thinking"]
# Role and kind of content of every turn, its calls and names, and the tools: everything on which a template may branch.
Shape = tuple[tuple[Any, ...], ...]


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a rendered conversation: a part of the turn with index `turn`, or template text between turns.

    `own`: the template wrote it, so it may hold control tokens. Calls count as written by the template.
    """

    text: str
    role: str | None
    turn: int | None = None
    own: bool = False


@dataclass(frozen=True, slots=True)
class _Hole:
    """Template text `before`, and the turn after it whose content follows, None at the end."""

    before: str
    turn: int | None
    with_thinking: bool = False
    is_reasoning: bool = False


class ChatTemplate:
    """One chat template with its variables: the texts of BOS and EOS, and the date (YYYY-MM-DD)."""

    def __init__(
        self,
        source: str,
        *,
        bos: str | None,
        eos: str | None,
        date: str,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """Raises ModelError with the line of a syntax error."""
        try:
            self._environment = Sandbox(Date.fromisoformat(date))
        except ValueError:
            raise ModelError("the date for the chat template is not a date", place="prompt.json") from None
        special = {name: text for name, text in (("bos_token", bos), ("eos_token", eos)) if text is not None}
        self._variables: dict[str, Any] = {**(arguments or {}), **special}
        self._source = source
        self._shapes: dict[Shape, list[_Hole]] = {}
        try:
            self._template = self._environment.from_string(source)
        except Exception as error:  # TemplateSyntaxError; a hostile template can break the compiler too
            place = f"chat template line {getattr(error, 'lineno', 1)}"
            raise ModelError(f"the chat template is not valid Jinja: {error}", place=place) from error

    @functools.cached_property
    def arguments(self) -> frozenset[str]:
        """The variables that the template reads, beside those that every template may read."""
        names = meta.find_undeclared_variables(self._environment.parse(self._source))
        return frozenset(names - _STANDARD - set(self._environment.globals))

    @functools.cached_property
    def _reasoning_names(self) -> tuple[str, ...]:
        """The keys of a turn under which the template reads reasoning."""
        return tuple(name for name in REASONING if re.search(rf"[.'\"]{name}\b", self._source))

    def render(self, messages: Sequence[Message], *, ask: bool = False, tools: str = "") -> str:
        """The conversation as text, as transformers' apply_chat_template renders it; `ask`: up to the next answer.

        `tools` is the JSON text of a list. Raises DataError with the template's own message, or with the line of the
        template that failed, and ModelError for a template that exceeds its budget of time or memory.
        """
        turns = [self._turn(message) for message in messages]
        self._environment.begin(len(tools) + sum(map(_size, messages)))
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(
                messages=turns,
                add_generation_prompt=ask,
                tools=json.loads(tools) if tools else None,
                documents=None,
                **self._variables,
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

    def _turn(self, message: Message) -> dict[str, Any]:
        """A turn as OpenAI writes it, with the reasoning under the names that the template reads."""
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.calls:
            turn["content"] = message.content or None
            turn["tool_calls"] = [
                {
                    **({"id": call.id} if call.id else {}),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.value},
                }
                for call in message.calls
            ]
        if message.reasoning:
            turn |= dict.fromkeys(self._reasoning_names, message.reasoning)
        if message.name:
            turn["name"] = message.name
        if message.call_id:
            turn["tool_call_id"] = message.call_id
        return turn

    def parts(self, messages: Sequence[Message], tools: str = "", stops: Sequence[str] = ()) -> list[Part]:
        """The rendered conversation cut into turns and template text; joined they are `render(messages)`.

        The template may strip blanks from a content and, from an assistant turn, its thinking. An empty thought that
        the template writes before an answer belongs to the answer, because the model must generate it, unless the
        generation prompt has it. An answer with reasoning or calls begins where the prompt of a plain answer ends, and
        ends with its content, or before the first of the texts `stops` after its calls. Every turn is there exactly
        once. Raises DataError when the template changes a content in any other way, or drops a part of the row.
        """
        messages = self._with_reasoning(messages)
        if any(message.calls for message in messages) and "tool_calls" not in self._source:
            raise self._shows_no_calls()
        text = self.render(messages, tools=tools)
        if tools and text == self.render(messages):
            hint = "remove `tools` from the row, or give a template that shows tools with data.template"
            raise DataError("the chat template does not show the tools of the row", hint=hint)
        holes = self._holes(messages, tools)
        cuts = self._cuts(messages, tools, holes, stops)
        parts: list[Part] = []
        located: list[int] = []
        position = 0
        answering: int | None = None  # the answer with reasoning or calls that has begun
        for index, hole in enumerate(holes):
            before, turn = hole.before, hole.turn
            following = holes[index + 1].before if index + 1 < len(holes) else ""
            if not text.startswith(before, position):
                raise self._lost(messages, turn)
            start = 0
            for offset, begins in cuts.get(index, ()):
                parts.append(_between(before[start:offset], answering))
                start, answering = offset, begins
            thought = ""
            is_plain = turn is not None and turn != answering
            if is_plain and turn is not None and messages[turn].role == "assistant":
                thought = self._empty_thought(before)
                before = before[: len(before) - len(thought)]
                if hole.with_thinking and self._asks_without_thought:
                    raise self._thinks(turn)
                if hole.with_thinking and thought:
                    raise self._thinks_twice(turn)
            parts.append(_between(before[start:], answering))
            position += len(before)
            if turn is None:
                break
            position += len(thought)
            message = messages[turn]
            forms = (
                _forms_of_reasoning(message.reasoning)
                if hole.is_reasoning
                else _forms(message.content, hole.with_thinking, message.role)
            )
            content = next((form for form in forms if text.startswith(form + following, position)), None)
            if content is None:
                raise self._lost(messages, turn)
            parts.append(Part(thought + content, message.role, turn))
            located += [] if hole.is_reasoning else [turn]
            position += len(content)
        if position < len(text):
            raise self._lost(messages, None)
        self._all_shown(messages, located, parts)
        return [part for part in parts if part.text or part.role == "assistant"]

    @property
    def shows_reasoning(self) -> bool:
        """Whether the template reads the reasoning of a turn, under a key of its own or in the content."""
        return bool(self._reasoning_names) or "</think>" in self._source

    def _with_reasoning(self, messages: Sequence[Message]) -> Sequence[Message]:
        """`messages` as the template reads them: their reasoning in the content, if it reads it there only."""
        if self._reasoning_names or not any(message.reasoning for message in messages):
            return messages
        if not self.shows_reasoning:
            hint = "remove it, write it into the content, or give a template that shows it with data.template"
            raise DataError("the chat template does not show the reasoning of the row", hint=hint)
        return [
            replace(m, content=f"{_THINK}{m.reasoning}{_END_THINK}{m.content}", reasoning="")
            if m.reasoning
            else m
            for m in messages
        ]

    def _cuts(
        self, messages: Sequence[Message], tools: str, holes: Sequence[_Hole], stops: Sequence[str]
    ) -> dict[int, list[tuple[int, int | None]]]:
        """Where answers with reasoning or calls begin and end: by index of the hole, (offset in the text before it, the
        turn that begins there; None for an end).
        """
        cuts: dict[int, list[tuple[int, int | None]]] = {}
        for turn, message in enumerate(messages):
            if not message.calls and not message.reasoning:
                continue
            own = [at for at, hole in enumerate(holes) if hole.turn == turn]
            if message.reasoning and self._asks_without_thought and any(holes[at].is_reasoning for at in own):
                raise self._thinks(turn)
            plain = self._holes([*messages[:turn], _ANSWER], tools)
            answer = next((at for at, hole in enumerate(plain) if hole.turn == turn), 0)
            first = 0  # the hole after the last one of the prompt
            if answer:
                last = plain[answer - 1]
                places = (at for at, hole in enumerate(holes, 1) if hole.turn == last.turn)
                first = max(places, default=len(holes) - 1)
            prompt = self._beginning(plain[answer].before, holes[first].before)
            if prompt is None:
                raise self._unclear(turn, "begins with other text than other answers")
            after = own[-1] + 1 if own else first
            start = len(prompt) if after == first else 0
            end = 0
            if message.calls:
                end = self._end_of_calls(messages[: turn + 1], tools, holes[after].before, start, stops)
            cuts.setdefault(first, []).append((len(prompt), turn))
            cuts.setdefault(after, []).append((end, None))
        return cuts

    def _beginning(self, prompt: str, text: str) -> str | None:
        """The end of the prompt of a plain answer, with which `text` begins; None if it does not.

        An earlier answer may lack the empty thought with which the prompt ends.
        """
        prompt = prompt[: len(prompt) - len(self._empty_thought(prompt))].rstrip(" ")
        without = _NO_THOUGHT.sub("", prompt)
        return next((form for form in (prompt, without) if text.startswith(form)), None)

    def _end_of_calls(
        self, messages: Sequence[Message], tools: str, text: str, start: int, stops: Sequence[str]
    ) -> int:
        """Where the calls of the last of `messages` end in the template's `text`, which continues after them."""
        if found := [at for at in (text.find(stop, start) for stop in stops) if at >= 0]:
            return min(found)
        alone = self._holes(messages, tools)[-1].before
        if not text.startswith(alone):
            raise self._unclear(len(messages) - 1, "has no stop token after its calls")
        return len(text if text == alone else alone.rstrip("\n"))

    def _all_shown(self, messages: Sequence[Message], located: Sequence[int], parts: Sequence[Part]) -> None:
        """Raise DataError where the template shows a content not at all or twice, or drops calls."""
        last = len(messages) - 1  # an earlier turn without content, as of a client's history, has no place
        answers = [
            t
            for t, m in enumerate(messages)
            if m.role == "assistant" and (m.content or (t == last and not m.calls))
        ]
        if [turn for turn in sorted(located) if messages[turn].role == "assistant"] != answers:
            raise self._lost(messages, None)
        for turn, message in enumerate(messages):
            if message.content and turn not in located:
                hint = "remove it, or give a template that shows it with data.template"
                raise DataError(
                    f"the chat template does not show the {message.role} turn {turn + 1}", hint=hint
                )
        for turn, message in enumerate(messages):
            shown = (
                "".join(part.text for part in parts if part.turn == turn and part.own)
                if message.calls
                else ""
            )
            if not all(call.name in shown for call in message.calls):
                raise self._shows_no_calls()

    def _holes(self, messages: Sequence[Message], tools: str = "") -> list[_Hole]:
        """The template's text cut at the contents; the last hole has no turn."""
        shape: Shape = (*((tools,) if tools else ()), *map(_form_of, messages))
        if shape in self._shapes:
            return self._shapes[shape]
        blank = [_placeholder(turn, message) for turn, message in enumerate(messages)]
        text = self.render(blank, tools=tools)
        holes: list[_Hole] = []
        position = 0
        for match in _HOLE.finditer(text):
            before = text[position : match.start()]
            thinks, reasons = match["think"] is not None, bool(match["reasoning"])
            holes.append(_Hole(before, int(match["turn"]), thinks, reasons))
            position = match.end()
        holes.append(_Hole(text[position:], None))
        is_frequent = not any(message.calls for message in messages)
        if is_frequent and len(self._shapes) < _MAX_KNOWN_SHAPES:
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
    def _shows_no_calls() -> DataError:
        hint = "remove the row, or give a template that shows calls of tools with data.template"
        return DataError("the chat template does not show the calls of tools", hint=hint)

    @staticmethod
    def _thinks(turn: int) -> DataError:
        hint = "take the thinking out of the answer, or give a template that asks for it with data.template"
        return DataError(f"turn {turn + 1} thinks, but the chat template asks without a thought", hint=hint)

    @staticmethod
    def _thinks_twice(turn: int) -> DataError:
        message = (
            f"the chat template writes an empty thought before the one in the content of turn {turn + 1}"
        )
        return DataError(
            message, hint="write the thought as `reasoning_content` of the turn, without <think>"
        )

    @staticmethod
    def _unclear(turn: int, reason: str) -> DataError:
        hint = "remove the row, or give another template with data.template"
        return DataError(
            f"in the chat template, turn {turn + 1} {reason}: what to train is not clear", hint=hint
        )

    @staticmethod
    def _lost(messages: Sequence[Message], turn: int | None) -> DataError:
        which = f"turn {turn + 1} ({messages[turn].role})" if turn is not None else "every turn"
        hint = "remove the row, or give a template that keeps contents as they are with data.template"
        return DataError(f"{which} cannot be found exactly in what the chat template renders", hint=hint)


def _between(text: str, answering: int | None) -> Part:
    """Template text between turns, or in the answer that has begun."""
    return Part(text, None) if answering is None else Part(text, "assistant", answering, own=True)


def _size(message: Message) -> int:
    """The characters of a turn."""
    calls = sum(len(call.name) + len(call.arguments) for call in message.calls)
    return len(message.content) + len(message.reasoning) + calls


def _form_of(message: Message) -> tuple[Any, ...]:
    """Everything of a turn on which a template may branch."""
    if not (message.calls or message.reasoning or message.name or message.call_id):
        return (message.role, _kind(message))
    named = (message.calls, message.name, message.call_id)
    return (message.role, _kind(message), bool(message.reasoning), *named)


def _kind(message: Message) -> Kind:
    if not message.content:
        return "empty"
    return "thinking" if message.role == "assistant" and "</think>" in message.content else "plain"


def _placeholder(turn: int, message: Message) -> Message:
    """A turn of the same shape with holes as its texts."""
    content = hole = f"{HOLE}{turn}{HOLE}"
    match _kind(message):
        case "empty":
            content = ""
        case "thinking":
            content = f"{_THINK}{HOLE}r{HOLE}\n</think>{hole}"
    return replace(message, content=content, reasoning=f"{HOLE}{turn}r{HOLE}" if message.reasoning else "")


def _forms_of_reasoning(text: str) -> Iterable[str]:
    yield from (
        text,
        text.strip("\n"),
        text.lstrip("\n"),
        text.rstrip("\n"),
        text.rstrip(),
        text.lstrip(),
        text.strip(),
    )


def _forms(content: str, with_thinking: bool, role: str) -> Iterable[str]:
    """The forms that a template may give a content, the unchanged one first."""
    yield from (content, content.lstrip("\n"), content.rstrip(), content.lstrip(), content.strip())
    if role == "tool":  # a result as JSON text
        yield from (json.dumps(form, ensure_ascii=False)[1:-1] for form in (content, content.strip()))
    if "</think>" in content:
        thinking, answer = content.rsplit("</think>", 1)
        if with_thinking:
            thinking = thinking.rsplit("<think>", 1)[-1].strip("\n")
            yield from (
                f"{_THINK}{thinking}{_END_THINK}{form}" for form in (answer.lstrip("\n"), answer.strip())
            )
        else:
            yield from (answer, answer.lstrip("\n"), answer.strip())
