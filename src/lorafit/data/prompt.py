"""The prompt contract, and the renderer that turns rows into ids and a mask of the trained ids.

One frozen object decides how a conversation becomes ids in training, evaluation, chat and serving. The ids of a
prompt (`prompt_ids`) are exactly the ids before the answer in training.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from lorafit.data.chat_template import ChatTemplate, Part
from lorafit.data.formats import Chat, Content, Instruction, Message, Row, undecodable
from lorafit.data.tokenizer import BORDER, Control, Tokenizer, reserved
from lorafit.errors import DataError, ModelError, Problem
from lorafit.storage.safe_read import MB, read_text

TrainOn = Literal["all", "response"]
TooLong = Literal["error", "truncate", "drop"]
TEMPLATES = ("auto", "chat", "alpaca", "classic")  # or the path of a .jinja file

_SCHEMA = 1
# The value of `strftime_now` in a template (Llama 3's own fallback): runs on different days must render alike.
_DATE = "2024-07-26"
_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_NO_CONVERSATIONS = "the {} template knows single instructions, no conversations"
_NAME_A_TEMPLATE = "name a chat template: data.template=PATH.jinja"


@dataclass(frozen=True, slots=True)
class PromptContract:
    """All that decides how a conversation becomes ids.

    `template` is classic, alpaca or chat; `chat_template` the Jinja source for chat, else None. `bos_id`,
    `eos_id` and their texts are None where the model has none. `system` is the system prompt of rows without
    one. `add_eos` ends every row in EOS unless the template ends it in a stop token. `stop_ids` end an answer
    in generation. `date` is the date of today for the template.
    """

    template: str
    chat_template: str | None
    system: str
    bos: str | None
    bos_id: int | None
    eos: str | None
    eos_id: int | None
    add_bos: bool
    add_eos: bool
    train_on: TrainOn
    max_length: int
    too_long: TooLong
    stop_ids: tuple[int, ...]
    date: str
    tokenizer_sha256: str

    def to_json(self) -> dict[str, Any]:
        """As JSON values, with the version of the schema."""
        return {"schema": _SCHEMA, **dataclasses.asdict(self), "stop_ids": list(self.stop_ids)}

    @classmethod
    def from_json(cls, value: Any) -> PromptContract:
        """The inverse of `to_json`; ModelError for another schema, other fields or values of another type."""
        value = value if isinstance(value, dict) else {}
        fields = {name: item for name, item in value.items() if name != "schema"}
        known = {field.name for field in dataclasses.fields(cls)}
        if value.get("schema") == _SCHEMA and set(fields) == known:
            with suppress(ValidationError):
                contract = TypeAdapter(cls).validate_python(fields)
                ids = (contract.bos_id or 0, contract.eos_id or 0, *contract.stop_ids)
                has_source = contract.template != "chat" or contract.chat_template
                if contract.template in TEMPLATES and has_source and min(ids) >= 0:
                    return contract
        hint = "it was written by another version of lorafit, or changed by hand"
        raise ModelError("is not a prompt contract of this version", place="prompt.json", hint=hint)

    def with_system(self, messages: Sequence[Message]) -> Sequence[Message]:
        """`messages` after the contract's system prompt, unless they have one."""
        if self.system and messages[0].role != "system":
            return [Message("system", self.system), *messages]
        return messages

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


def contract(
    tokenizer: Tokenizer,
    *,
    template: str,
    system: str = "",
    train_on: TrainOn,
    max_length: int,
    too_long: TooLong,
    add_eos: bool,
) -> PromptContract:
    """The contract for a model: `template` is one of TEMPLATES or the path of a .jinja file.

    `auto` is the model's chat template if it has one, else alpaca. Raises ModelError when a chat template is
    needed and missing, does not render a question and an answer, or when `add_eos` and the model has no EOS.
    """
    source = tokenizer.chat_template
    if template.endswith((".jinja", ".jinja2", ".j2")):
        template, source = "chat", _read_template(Path(template).expanduser())
    elif template == "auto":
        template = "chat" if source else "alpaca"
    elif template not in TEMPLATES:
        hint = f"use one of {', '.join(TEMPLATES)}, or the path of a .jinja file"
        raise ModelError(f"unknown template {template!r}", place="data.template", hint=hint)
    if template == "chat" and not source:
        raise ModelError("the model has no chat template", place="data.template", hint=_NAME_A_TEMPLATE)
    if add_eos and tokenizer.eos is None:
        raise ModelError(
            "the tokenizer names no EOS token", hint="add `eos_token` to its tokenizer_config.json"
        )
    result = PromptContract(
        template=template,
        chat_template=source if template == "chat" else None,
        system=system,
        bos=tokenizer.bos.text if tokenizer.bos else None,
        bos_id=tokenizer.bos.id if tokenizer.bos else None,
        eos=tokenizer.eos.text if tokenizer.eos else None,
        eos_id=tokenizer.eos.id if tokenizer.eos else None,
        add_bos=tokenizer.adds_bos,
        add_eos=add_eos,
        train_on=train_on,
        max_length=max_length,
        too_long=too_long,
        stop_ids=tokenizer.stop_ids,
        date=_DATE,
        tokenizer_sha256=tokenizer.sha256,
    )
    if template != "chat" or (stop := _template_stop(result, tokenizer)) is None:
        return result
    return dataclasses.replace(result, stop_ids=tuple(dict.fromkeys([*result.stop_ids, stop.id])))


def _read_template(path: Path) -> str:
    try:
        return read_text(path, MB)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ModelError(f"the chat template cannot be read: {reason}", place=str(path)) from error


def _chat_template(contract: PromptContract, tokenizer: Tokenizer) -> ChatTemplate | None:
    if contract.chat_template is None:
        return None
    return ChatTemplate(
        contract.chat_template,
        bos=contract.bos,
        eos=contract.eos,
        date=contract.date,
        arguments=tokenizer.named,
    )


def _template_stop(contract: PromptContract, tokenizer: Tokenizer) -> Control | None:
    """The control token that the chat template puts after an answer, often not the tokenizer's EOS."""
    template = _chat_template(contract, tokenizer)
    assert template is not None
    try:
        parts = template.parts([Message("user", "question"), Message("assistant", "answer")])
    except DataError as error:
        problem = error.problems[0]
        message = f"a question and an answer cannot be rendered: {problem.message}"
        raise ModelError(message, place=problem.place or "chat template", hint=_NAME_A_TEMPLATE) from error
    leading = tokenizer.leading_control(tokenizer.protect(parts[-1].text))
    return leading if parts[-1].role is None else None


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as ids, and for each id whether it is a training target; the first id never is."""

    ids: list[int]
    trained: list[bool]


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

    `answer`: it starts with an answer. The answer ends with the control token `stop`, else with the segment.
    """

    text: str
    answer: bool = False
    stop: Control | None = None


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
        self._template = _chat_template(contract, tokenizer)

    def render_batch(self, rows: Sequence[Row]) -> list[Rendered | Dropped | Problem]:
        """Each row in full (no limit on its length), or the reason why it cannot be rendered."""
        outcomes = [self._segments_or_fault(row) for row in rows]
        texts = [self._joined(segments) for segments in outcomes if isinstance(segments, list)]
        encoded = self.tokenizer.encode_batch(texts)
        return [self._assemble(o, *next(encoded)) if isinstance(o, list) else o for o in outcomes]

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

    def prompt_ids(self, source: Row | Content | Sequence[Message]) -> list[int]:
        """The ids after which the answer begins: of a row without its last answer, or of a conversation that
        ends in a user turn. Raises DataError if it cannot be rendered.
        """
        text = self._prompt(source)
        ids = next(self.tokenizer.encode_batch([text]))[0] if text else []
        return [*self._bos(text), *ids]

    def prompt_text(self, source: Row | Content | Sequence[Message]) -> tuple[str, str]:
        """The text of `prompt_ids` with public names: (BOS where it is put before the text, the text)."""
        text = self._prompt(source)
        return (self.contract.bos or "") if self._bos(text) else "", self.tokenizer.public(text)

    def _prompt(self, source: Row | Content | Sequence[Message]) -> str:
        """The protected text after which the answer begins."""
        content = self._question(source.content if isinstance(source, Row) else source)
        if fault := _unusable_in(content):
            raise DataError(fault, hint="remove that character")
        return self._joined(self._segments(content)[:-1])

    def _question(self, source: Content | Sequence[Message]) -> Content:
        """The question in `source` with a placeholder for its answer."""
        content = (source if isinstance(source, Content) else Chat(tuple(source))).with_answer("answer")
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

    def _segments_or_fault(self, row: Row) -> list[_Segment] | Dropped | Problem:
        content = row.content
        # Whole-text training trains the question too. In a chat template no empty answer could be located.
        needs_answer = self.contract.train_on == "response" or self.contract.template == "chat"
        if needs_answer and isinstance(content, Instruction) and not content.output.strip():
            return Dropped("the answer is empty")
        if fault := _unusable_in(content):
            return Problem(fault, row.place, "remove that character")
        try:
            return self._segments(content)
        except DataError as error:
            problem = error.problems[0]
            place = f"{row.place}; {problem.place}" if problem.place else row.place
            return Problem(problem.message, place, problem.hint)

    def _segments(self, content: Content) -> list[_Segment]:
        """The protected text of a row, without BOS and EOS; the last segment holds the last answer."""
        if isinstance(content, Instruction) and self.contract.template != "chat":
            prompt = self._instruction_prompt(content)
        elif (messages := content.turns()) is not None:
            return self._chat_segments(messages)
        else:
            prompt = content.question()
        segments = [_Segment(prompt)]
        _continue(segments, content.answers()[-1])
        return segments

    def _instruction_prompt(self, row: Instruction) -> str:
        preamble = row.system or self.contract.system
        if not preamble and self.contract.template == "alpaca":
            preamble = _ALPACA_WITH_INPUT if row.input else _ALPACA
        head = f"{preamble}\n\n" if preamble else ""
        extra = f"### Input:\n{row.input}\n\n" if row.input else ""
        return f"{head}### Instruction:\n{row.instruction}\n\n{extra}### Response:\n"

    def _chat_segments(self, messages: Sequence[Message]) -> list[_Segment]:
        if self._template is None:
            hint = f"use data.template=auto, or if the model has no chat template, {_NAME_A_TEMPLATE}"
            raise DataError(_NO_CONVERSATIONS.format(self.contract.template), hint=hint)
        parts = self._template.parts(self.contract.with_system(messages))
        last_answer = max(index for index, part in enumerate(parts) if part.role == "assistant")
        segments = [_Segment("")]
        for index, part in enumerate(parts):
            if part.role is None:
                segments[-1].text += self.tokenizer.protect(part.text)
            elif part.role != "assistant":
                segments[-1].text += part.text
            else:
                _continue(segments, part.text)
                stop = self._stop(parts[index + 1]) if index + 1 < len(parts) else None
                segments[-1].stop = stop
                if stop is None and index < last_answer:  # the last answer continues up to EOS
                    segments.append(_Segment(""))
        return segments

    def _stop(self, after_answer: Part) -> Control | None:
        """The stop token with which the part after an answer begins."""
        if after_answer.role is not None:
            return None
        control = self.tokenizer.leading_control(self.tokenizer.protect(after_answer.text))
        return control if control and control.id in self.contract.stop_ids else None

    def _joined(self, segments: Sequence[_Segment]) -> str:
        """The text to encode, with a BORDER where answers begin, unless all of it is trained."""
        return ("" if self.contract.train_on == "all" else BORDER).join(segment.text for segment in segments)

    def _assemble(self, segments: Sequence[_Segment], ids: list[int], borders: list[int]) -> Rendered:
        if self.contract.train_on == "all":
            trained = [True] * len(ids)
        else:
            trained = []
            for segment, start, end in zip(segments, [0, *borders], [*borders, len(ids)], strict=True):
                stop = start
                if segment.answer:
                    stop = ids.index(segment.stop.id, start) + 1 if segment.stop else end
                trained += [True] * (stop - start) + [False] * (end - stop)
        if self._ends_in_eos(segments):
            assert self.contract.eos_id is not None
            ids.append(self.contract.eos_id)
            trained.append(True)
        bos = self._bos(segments[0].text)
        ids[:0] = bos
        trained[:0] = [False] * len(bos)
        trained[:1] = [False]
        return Rendered(ids, trained)

    def _spans(self, segments: Sequence[_Segment]) -> Iterator[Span]:
        """The protected text with BOS and EOS, cut where training begins and ends."""
        bos, everything = self.contract.bos, self.contract.train_on == "all"
        yield Span(self.tokenizer.protect(bos or "") if self._bos(segments[0].text) else "", False)
        for segment in segments:
            cut = len(segment.text)
            if segment.stop:
                cut = segment.text.index(name := self.tokenizer.protect(segment.stop.text)) + len(name)
            yield Span(segment.text[:cut], segment.answer or everything)
            yield Span(segment.text[cut:], everything)
        yield Span(
            self.tokenizer.protect(self.contract.eos or "") if self._ends_in_eos(segments) else "", True
        )

    def _bos(self, text: str) -> list[int]:
        """BOS if it is put before the protected `text`; nothing where the template writes it."""
        if not self.contract.add_bos or self.contract.bos_id is None or self.contract.bos is None:
            return []
        return [] if text.startswith(self.tokenizer.protect(self.contract.bos)) else [self.contract.bos_id]

    def _ends_in_eos(self, segments: Sequence[_Segment]) -> bool:
        return self.contract.add_eos and segments[-1].stop is None


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
