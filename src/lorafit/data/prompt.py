"""The prompt contract, and the renderer that turns rows into ids and a mask of the trained ids.

One frozen object decides how a conversation becomes ids in training, evaluation, chat and serving. The ids of a
prompt (`prompt_ids`) are exactly the ids before the answer in training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from lorafit.data.chat_template import Part
from lorafit.data.contract import NAME_A_TEMPLATE, RAW, PromptContract, contract
from lorafit.data.formats import (
    Chat,
    Completion,
    Content,
    Instruction,
    Message,
    Row,
    as_messages,
    undecodable,
)
from lorafit.data.tokenizer import BORDER, GUARD, Control, Tokenizer, reserved
from lorafit.errors import DataError, ModelError, Problem

__all__ = ["Dropped", "Piece", "PromptContract", "Rendered", "Renderer", "Span", "contract"]

Source = Row | Content | Sequence[Message] | Sequence[Mapping[str, object]]
_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_NO_CONVERSATIONS = "the {} template knows single instructions, no conversations"


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as ids, and for each id whether it is a training target; the first id never is.

    `weights` has the factor of the loss of each id where one of them is neither 0 nor 1, else None.
    """

    ids: list[int]
    trained: list[bool]
    weights: list[float] | None = None

    @property
    def longest(self) -> int:
        """The number of ids that the model reads at a time."""
        return len(self.ids)

    @property
    def is_supervised(self) -> bool:
        """Whether anything is trained."""
        return True in self.trained

    def first(self, length: int) -> Rendered:
        """The first `length` ids."""
        weights = self.weights and self.weights[:length]
        return Rendered(self.ids[:length], self.trained[:length], weights)


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row with nothing to train on, and the reason."""

    reason: str


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a rendered row as text, and whether it is trained."""

    text: str
    trained: bool


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a rendered row: text, whether it is trained, and whether it is one control token."""

    text: str
    trained: bool
    control: bool


@dataclass(slots=True)
class _Segment:
    """A stretch of protected text that is encoded as the continuation of what precedes it.

    `answer`: it starts with an answer. The answer ends with the control token `stop`, else with the segment. `weight`
    is the factor of its loss. `ended`: its text holds the stop token.
    """

    text: str
    answer: bool = False
    stop: Control | None = None
    weight: float = 1.0
    ended: bool = False


class Renderer:
    """Renders rows by a contract, with the tokenizer of the contract."""

    def __init__(self, contract: PromptContract, tokenizer: Tokenizer) -> None:
        if contract.tokenizer_sha256 != tokenizer.sha256:
            hint = "use the tokenizer of the model that the run was started with"
            raise ModelError(
                "the prompt contract belongs to another tokenizer", place="prompt.json", hint=hint
            )
        self.contract = contract
        self.tokenizer = tokenizer
        self._template = contract.jinja(tokenizer)
        self._stops = [text for text, number in tokenizer.control.items() if number in contract.stop_ids]

    @property
    def shows_reasoning(self) -> bool:
        """Whether a prompt has a place for the reasoning of earlier answers."""
        return self._template is not None and self._template.shows_reasoning

    def render_batch(self, rows: Sequence[Row]) -> list[Rendered | Dropped | Problem]:
        """Each row in full (no limit on its length), or the reason why it cannot be rendered."""
        outcomes = [self._segments_or_fault(row) for row in rows]
        texts = [self._joined(segments) for segments in outcomes if isinstance(segments, list)]
        encoded = self.tokenizer.encode_batch(texts)
        return [
            self._assemble(segments, *next(encoded), row.weight) if isinstance(segments, list) else segments
            for row, segments in zip(rows, outcomes, strict=True)
        ]

    def text(self, row: Row) -> list[Span]:
        """The row as the model reads it, cut where training begins and ends; DataError if that fails."""
        groups = groupby(self.pieces(row), lambda piece: piece.trained)
        return [Span("".join(piece.text for piece in pieces), trained) for trained, pieces in groups]

    def pieces(self, row: Row) -> list[Piece]:
        """As `text`, each control token a piece of its own; DataError if the row cannot be rendered or is dropped."""
        segments = self._segments_or_fault(row)
        if isinstance(segments, Problem):
            raise DataError.of([segments])
        if isinstance(segments, Dropped):
            raise DataError(segments.reason, place=row.place)
        return [
            Piece(text, span.trained, control)
            for span in self._spans(segments)
            for text, control in self.tokenizer.cut(span.text)
        ]

    def prompt_ids(self, source: Source) -> list[int]:
        """The ids after which the answer begins: of a row without its last answer, or of a conversation of Messages, or
        of objects with `role` and `content`, that ends in a user turn. Raises DataError if it cannot be rendered.
        """
        text = self._prompt(source)
        ids = next(self.tokenizer.encode_batch([text]))[0] if text else []
        return [*self._bos(text), *ids]

    def prompt_text(self, source: Source) -> tuple[str, str]:
        """The text of `prompt_ids` with public names: (BOS where it is put before the text, the text)."""
        text = self._prompt(source)
        return (self.contract.bos or "") if self._bos(text) else "", self.tokenizer.public(text)

    def _prompt(self, source: Source) -> str:
        """The protected text after which the answer begins."""
        content = self._question(source.content if isinstance(source, Row) else source)
        if fault := _unusable_in(content):
            raise DataError(fault, hint="remove that character")
        return self._joined(self._segments(content)[:-1])

    def _question(self, source: Content | Sequence[Message] | Sequence[Mapping[str, object]]) -> Content:
        """The question in `source` with a placeholder for its answer."""
        content = (source if isinstance(source, Content) else Chat(as_messages(source))).with_answer("answer")
        if self.contract.template == RAW:
            return self._raw(content)
        if not isinstance(content, Chat):
            return content
        *messages, _ = content.messages
        if not messages:
            raise DataError("the conversation is empty", hint="add a user turn")
        if self.contract.template == "chat" or isinstance(source, Chat):
            return content
        roles = [message.role for message in messages]
        if roles not in (["user"], ["system", "user"]):
            hint = "start a new conversation for each question"
            raise DataError(_NO_CONVERSATIONS.format(self.contract.template), hint=hint)
        system = messages[0].content if len(messages) > 1 else ""
        return Instruction(messages[-1].content, "", "answer", system)

    def _raw(self, content: Content) -> Content:
        """The one text of a question that no template surrounds. Raises DataError where it is more than one text."""
        turns = content.turns()
        if turns is None:
            return content
        if [turn.role for turn in turns] != ["user", "assistant"] or (
            isinstance(content, Chat) and content.tools
        ):
            hint = "give one text: no system prompt, no tools, and no earlier turns"
            raise DataError("the rows of the training had no template: a prompt is one text", hint=hint)
        return Completion(turns[0].content, "answer")

    def _segments_or_fault(self, row: Row) -> list[_Segment] | Dropped | Problem:
        content = row.content
        # Whole-text training trains the question too. In a chat template no empty answer could be located.
        needs_answer = self.contract.train_on != "all" or self.contract.template == "chat"
        if needs_answer and isinstance(content, Instruction) and not content.output.strip():
            return Dropped("the answer is empty")
        if row.weight == 0:
            return Dropped("its loss has weight 0")
        if fault := _unusable_in(content):
            return Problem(fault, row.place, "remove that character")
        try:
            segments = self._segments(content)
        except DataError as error:
            problem = error.problems[0]
            place = f"{row.place}; {problem.place}" if problem.place else row.place
            return Problem(problem.message, place, problem.hint)
        if not any(segment.weight for segment in segments if segment.answer):
            return Dropped("the loss of every turn has weight 0")
        return segments

    def _segments(self, content: Content) -> list[_Segment]:
        """The protected text of a row, without BOS and EOS; the last segment holds the last answer."""
        if isinstance(content, Instruction) and self.contract.template == RAW:
            return self._plain_segments(content.question(), content.output)
        if isinstance(content, Instruction) and self.contract.template != "chat":
            prompt = self._instruction_prompt(content)
        elif (messages := content.turns()) is not None:
            return self._chat_segments(messages, content.tools if isinstance(content, Chat) else "")
        else:
            return self._plain_segments(content.question(), content.answers()[-1])
        segments = [_Segment(prompt)]
        _continue(segments, content.answers()[-1])
        return segments

    def _plain_segments(self, prompt: str, answer: str) -> list[_Segment]:
        """A text and its continuation without a template; they may hold control tokens with `parse_special`."""
        if not self.contract.parse_special:
            segments = [_Segment(prompt)]
            _continue(segments, answer)
            return segments
        segments = [_Segment(self.tokenizer.protect(prompt))]
        _continue(segments, text := self.tokenizer.protect(answer))
        ends = text.rstrip()
        segments[-1].ended = any(ends.endswith(self.tokenizer.protect(stop)) for stop in self._stops)
        return segments

    def _instruction_prompt(self, row: Instruction) -> str:
        preamble = row.system or self.contract.system
        if not preamble and self.contract.template == "alpaca":
            preamble = _ALPACA_WITH_INPUT if row.input else _ALPACA
        head = f"{preamble}\n\n" if preamble else ""
        extra = f"### Input:\n{row.input}\n\n" if row.input else ""
        return f"{head}### Instruction:\n{row.instruction}\n\n{extra}### Response:\n"

    def _chat_segments(self, messages: Sequence[Message], tools: str = "") -> list[_Segment]:
        if self._template is None:
            hint = f"use data.template=auto, or if the model has no chat template, {NAME_A_TEMPLATE}"
            raise DataError(_NO_CONVERSATIONS.format(self.contract.template), hint=hint)
        messages = self.contract.with_system(messages)
        parts = self._parts(messages, tools)
        answers = [index for index, part in enumerate(parts) if part.role == "assistant"]
        last_answer, last_turn = answers[-1], parts[answers[-1]].turn
        segments = [_Segment("")]
        turn: int | None = None  # the answer that the last segment holds
        for index, part in enumerate(parts):
            if part.role is None:
                segments[-1].text += self.tokenizer.protect(part.text).replace(GUARD, "")
            elif part.role != "assistant":
                segments[-1].text += part.text
            elif part.turn == turn:
                segments[-1].text += self._own(part)
            elif part.own:
                _continue(segments, self._own(part))
            else:
                _continue(segments, part.text)
            if part.role != "assistant":
                turn = None
                continue
            turn = part.turn
            assert turn is not None
            only_last = self.contract.train_on == "last" and turn != last_turn
            segments[-1].weight = 0.0 if only_last else messages[turn].weight
            follows = parts[index + 1] if index + 1 < len(parts) else None
            if follows is not None and follows.turn == turn:
                continue
            segments[-1].stop = stop = self._stop(follows) if follows else None
            if stop is None and index < last_answer:  # the last answer continues up to EOS
                segments.append(_Segment(""))
        return segments

    def _parts(self, messages: Sequence[Message], tools: str) -> list[Part]:
        """The conversation by the chat template. No text of tools and calls becomes a control token."""
        assert self._template is not None
        if not tools and all(message.role != "tool" and not message.calls for message in messages):
            return self._template.parts(messages, stops=self._stops)
        guard = self.tokenizer.guard
        guarded = [
            dataclasses.replace(
                message,
                name=guard(message.name),
                call_id=guard(message.call_id),
                calls=tuple(
                    dataclasses.replace(
                        call, name=guard(call.name), arguments=guard(call.arguments), id=guard(call.id)
                    )
                    for call in message.calls
                ),
            )
            for message in messages
        ]
        parts = self._template.parts(guarded, guard(tools), self._stops)
        if guarded != list(messages) or guard(tools) != tools:
            text = "".join(part.text for part in parts).replace(GUARD, "")
            if text != self._template.render(messages, tools=tools):
                hint = "remove the row, or the text of the control token from it"
                raise DataError("a call or a tool holds the text of a control token", hint=hint)
        return parts

    def _own(self, part: Part) -> str:
        """The protected text of a part of an answer."""
        return self.tokenizer.protect(part.text).replace(GUARD, "") if part.own else part.text

    def _stop(self, after_answer: Part) -> Control | None:
        """The stop token with which the part after an answer begins."""
        if after_answer.role is not None:
            return None
        control = self.tokenizer.leading_control(self.tokenizer.protect(after_answer.text))
        return control if control and control.id in self.contract.stop_ids else None

    def _joined(self, segments: Sequence[_Segment]) -> str:
        """The text to encode, with a BORDER where answers begin, unless all of it is trained."""
        return ("" if self._is_whole(segments) else BORDER).join(segment.text for segment in segments)

    def _is_whole(self, segments: Sequence[_Segment]) -> bool:
        """Whether all of the row is trained alike."""
        return self.contract.train_on == "all" and all(segment.weight == 1 for segment in segments)

    def _assemble(
        self, segments: Sequence[_Segment], ids: list[int], borders: list[int], weight: float = 1.0
    ) -> Rendered:
        weights: list[float] = []
        if self._is_whole(segments):
            trained = [True] * len(ids)
            weights = [weight] * len(ids) if weight != 1 else []
        else:
            trained = []
            everything = self.contract.train_on == "all"
            is_weighted = weight != 1 or any(segment.weight not in (0, 1) for segment in segments)
            for segment, start, end in zip(segments, [0, *borders], [*borders, len(ids)], strict=True):
                stop = start
                if segment.answer:
                    stop = ids.index(segment.stop.id, start) + 1 if segment.stop else end
                if is_weighted:
                    weights += [weight * segment.weight] * (stop - start) + [weight * everything] * (
                        end - stop
                    )
                trained += [segment.weight > 0] * (stop - start) + [everything] * (end - stop)
        if self._ends_in_eos(segments):
            assert self.contract.eos_id is not None
            ids.append(self.contract.eos_id)
            trained.append(segments[-1].weight > 0)
            weights += [weight * segments[-1].weight] * bool(weights)
        bos = self._bos(segments[0].text)
        ids[:0] = bos
        trained[:0] = [False] * len(bos)
        trained[:1] = [False]
        if not weights:
            return Rendered(ids, trained)
        weights[:0] = [0.0] * len(bos)
        return Rendered(ids, trained, [on * factor for on, factor in zip(trained, weights, strict=True)])

    def _spans(self, segments: Sequence[_Segment]) -> Iterator[Span]:
        """The protected text with BOS and EOS, cut where training begins and ends."""
        bos, everything = self.contract.bos, self.contract.train_on == "all"
        yield Span(self.tokenizer.protect(bos or "") if self._bos(segments[0].text) else "", False)
        for segment in segments:
            cut = len(segment.text) if segment.answer else 0
            if segment.stop:
                cut = segment.text.index(name := self.tokenizer.protect(segment.stop.text)) + len(name)
            yield Span(segment.text[:cut], segment.weight > 0)
            yield Span(segment.text[cut:], everything)
        is_trained = segments[-1].weight > 0
        yield Span(
            self.tokenizer.protect(self.contract.eos or "") if self._ends_in_eos(segments) else "", is_trained
        )

    def _bos(self, text: str) -> list[int]:
        """BOS if it is put before the protected `text`; nothing where the template writes it."""
        if not self.contract.add_bos or self.contract.bos_id is None or self.contract.bos is None:
            return []
        return [] if text.startswith(self.tokenizer.protect(self.contract.bos)) else [self.contract.bos_id]

    def _ends_in_eos(self, segments: Sequence[_Segment]) -> bool:
        return self.contract.add_eos and segments[-1].stop is None and not segments[-1].ended


def _continue(segments: list[_Segment], answer: str) -> None:
    """Add a segment for `answer`, with the blanks before it. Tokenizers join a blank to the word that follows, so the
    model has never read a prompt that ends in a blank.
    """
    text = segments[-1].text
    segments[-1].text = text.rstrip(" ")
    blanks = text[len(segments[-1].text) :]
    if not segments[-1].text:
        segments.pop()
    segments.append(_Segment(blanks + answer, answer=True))


def _unusable_in(content: Content) -> str:
    """The fault of a text of `content` that no tokenizer accepts or that is reserved, "" if there is none."""
    for field, text in content.fields().items():
        if fault := undecodable(text):
            return f"`{field}` holds {fault}"
        if character := reserved(text):
            return f"`{field}` holds the noncharacter {character}, which is reserved for use inside programs"
    return ""
