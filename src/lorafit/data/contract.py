"""The prompt contract: the one frozen object that decides how a conversation becomes ids."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from lorafit.data.chat_template import ChatTemplate
from lorafit.data.formats import Message
from lorafit.data.tokenizer import Control, Tokenizer
from lorafit.errors import DataError, ModelError, Problem
from lorafit.storage.safe_read import MB, read_text

TrainOn = Literal["all", "response", "last"]
TooLong = Literal["error", "truncate", "drop", "split"]
TEMPLATES = ("auto", "chat", "alpaca", "classic")  # or the path of a .jinja file
RAW = "raw"  # of a run whose rows have no template: a prompt is used as it is
TemplateArgs = Mapping[str, bool | int | float | str]

_SCHEMA = 1
# The value of `strftime_now` in a template (Llama 3's own fallback): runs on different days must render alike.
_DATE = "2024-07-26"
NAME_A_TEMPLATE = "name a chat template: data.template=PATH.jinja"


@dataclass(frozen=True, slots=True)
class PromptContract:
    """All that decides how a conversation becomes ids.

    `template` is classic, alpaca, chat or raw (none: a prompt is used as it is); `chat_template` the Jinja source
    for chat, else None. `bos_id`, `eos_id` and their texts are None where the model has none. `system` is the system
    prompt of rows without one. `add_eos` ends every row in EOS unless the template ends it in a stop token. `stop_ids`
    end an answer in generation. `date` is the date of today for the template, `template_args` are its other variables.
    `parse_special`: texts without a template may hold control tokens.
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
    template_args: TemplateArgs = field(default_factory=dict)
    parse_special: bool = False

    def to_json(self) -> dict[str, Any]:
        """As JSON values, with the version of the schema; without the later fields that have their default."""
        values = {"schema": _SCHEMA, **dataclasses.asdict(self), "stop_ids": list(self.stop_ids)}
        return {name: value for name, value in values.items() if name not in _LATER or value != _LATER[name]}

    @classmethod
    def from_json(cls, value: Any) -> PromptContract:
        """The inverse of `to_json`; ModelError for another schema, other fields or values of another type."""
        value = value if isinstance(value, dict) else {}
        fields = {name: item for name, item in value.items() if name != "schema"}
        known = {field.name for field in dataclasses.fields(cls)}
        if value.get("schema") == _SCHEMA and set(fields) | set(_LATER) == known:
            with suppress(ValidationError):
                contract = TypeAdapter(cls).validate_python(fields)
                ids = (contract.bos_id or 0, contract.eos_id or 0, *contract.stop_ids)
                has_source = contract.template != "chat" or contract.chat_template
                if contract.template in (*TEMPLATES, RAW) and has_source and min(ids) >= 0:
                    return contract
        hint = "it was written by another version of lorafit, or changed by hand"
        raise ModelError("is not a prompt contract of this version", place="prompt.json", hint=hint)

    def as_raw(self, tokenizer: Tokenizer) -> PromptContract:
        """The contract of a run none of whose rows has a template."""
        return dataclasses.replace(
            self, template=RAW, chat_template=None, system="", stop_ids=tokenizer.stop_ids, template_args={}
        )

    def with_system(self, messages: Sequence[Message]) -> Sequence[Message]:
        """`messages` after the contract's system prompt, unless they have one."""
        if self.system and messages[0].role != "system":
            return [Message("system", self.system), *messages]
        return messages

    def jinja(self, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The chat template with its variables; None for another kind of template."""
        if self.chat_template is None:
            return None
        arguments = {**tokenizer.named, **self.template_args}
        return ChatTemplate(
            self.chat_template, bos=self.bos, eos=self.eos, date=self.date, arguments=arguments
        )

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


def begins_with(bos: str | None, add_bos: bool) -> str:
    """How a text begins, by the BOS of a contract: for check, card and report."""
    if bos is None:
        return "no BOS: the model has none"
    return f"{bos}, once" if add_bos else f"what the template writes: the tokenizer adds no {bos}"


_LATER: dict[str, Any] = {
    "template_args": {},
    "parse_special": False,
}  # fields that old contracts do not have


def contract(
    tokenizer: Tokenizer,
    *,
    template: str,
    system: str = "",
    train_on: TrainOn,
    max_length: int,
    too_long: TooLong,
    add_eos: bool,
    template_args: TemplateArgs | None = None,
    parse_special: bool = False,
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
        raise ModelError("the model has no chat template", place="data.template", hint=NAME_A_TEMPLATE)
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
        template_args=dict(template_args or {}),
        parse_special=parse_special,
    )
    _check_arguments(result, tokenizer)
    if template != "chat" or (stop := _template_stop(result, tokenizer)) is None:
        return result
    return dataclasses.replace(result, stop_ids=tuple(dict.fromkeys([*result.stop_ids, stop.id])))


def _read_template(path: Path) -> str:
    try:
        return read_text(path, MB)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ModelError(f"the chat template cannot be read: {reason}", place=str(path)) from error


def _check_arguments(contract: PromptContract, tokenizer: Tokenizer) -> None:
    """Raise ModelError for an argument that the chat template does not read."""
    template = contract.jinja(tokenizer)
    if not contract.template_args:
        return
    if template is None:
        message = f"the {contract.template} template has no arguments"
        raise ModelError(message, place="data.template_args", hint=NAME_A_TEMPLATE)
    if unknown := sorted(set(contract.template_args) - template.arguments):
        has = ", ".join(f"`{name}`" for name in sorted(template.arguments)) or "none"
        raise ModelError.of(
            Problem(f"the chat template reads no `{name}`", "data.template_args", f"its arguments: {has}")
            for name in unknown
        )


def _template_stop(contract: PromptContract, tokenizer: Tokenizer) -> Control | None:
    """The control token that the chat template puts after an answer, often not the tokenizer's EOS."""
    template = contract.jinja(tokenizer)
    assert template is not None
    try:
        parts = template.parts([Message("user", "question"), Message("assistant", "answer")])
    except DataError as error:
        problem = error.problems[0]
        message = f"a question and an answer cannot be rendered: {problem.message}"
        raise ModelError(message, place=problem.place or "chat template", hint=NAME_A_TEMPLATE) from error
    leading = tokenizer.leading_control(tokenizer.protect(parts[-1].text))
    return leading if parts[-1].role is None else None
