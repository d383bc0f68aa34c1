"""The form of a run, generated from the schema: every key with its help, bounds, default and kind of input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import yaml

from lorafit.config.guide import GUIDE
from lorafit.config.reference import sections as listed_sections
from lorafit.config.schema import Config, sections

Input = Literal["choice", "number", "text", "lines", "mapping"]
FIRST = ("model.name", "data.path", *GUIDE)  # what a run needs, then the ten keys that matter most
OWN = ("run.output",)  # made of the name of the run
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


@dataclass(frozen=True, slots=True)
class FormField:
    """One key: `kind` and `default` as in docs/config.md, `bounds` as `≥ 1, ≤ 1024`, `usual` what people use."""

    key: str
    input: Input
    kind: str
    default: str
    help: str
    bounds: str
    usual: str
    choices: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """The name of its input in the page."""
        return self.key.replace(".", "-")


def form_fields() -> dict[str, list[FormField]]:
    """The fields by section, `first` before all: each key once."""
    all_fields = {field.key: field for field in _fields()}
    groups = {"first": [all_fields[key] for key in FIRST]}
    for key, field in all_fields.items():
        if key not in FIRST and key not in OWN:
            groups.setdefault(key.partition(".")[0], []).append(field)
    return groups


def field_of(key: str) -> FormField:
    """The field of a key."""
    return next(field for field in _fields() if field.key == key)


def texts_of(values: Mapping[str, Any]) -> dict[str, str]:
    """Nested values of a recipe as the texts of the form's inputs, by key; what it does not have is left out."""
    texts = {}
    for field in _fields():
        section, _, name = field.key.partition(".")
        held = values.get(section)
        if isinstance(held, Mapping) and name in held and held[name] is not None:
            texts[field.key] = _text(held[name], field.input)
    return texts


def changed_texts(config: Config) -> dict[str, str]:
    """The keys of a config that differ from their defaults, as texts of the form."""
    values: dict[str, dict[str, Any]] = {}
    for section, model in sections().items():
        held = getattr(config, section)
        written = held.model_dump(mode="json")
        for name, info in model.model_fields.items():
            if info.is_required() or getattr(held, name) != info.get_default():
                values.setdefault(section, {})[name] = written[name]
    return texts_of(values)


def overrides_of(texts: Mapping[str, str]) -> tuple[dict[str, str], dict[str, object]]:
    """The inputs that are not empty: (values as after `section.key=`, texts and lists of texts as they are)."""
    known = {field.key: field for field in _fields()}
    parsed: dict[str, str] = {}
    taken: dict[str, object] = {}
    for key, text in texts.items():
        text = text.strip().replace("\r\n", "\n")
        if key in known and text:
            field = known[key]
            if field.input == "lines":
                taken[key] = [line.strip() for line in text.split("\n") if line.strip()]
            elif field.kind == "string":
                taken[key] = text
            else:
                parsed[key] = text
    return parsed, taken


def _text(value: Any, kind: Input) -> str:
    if kind == "lines":
        return "\n".join([value] if isinstance(value, str) else map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | list):
        return yaml.safe_dump(value, default_flow_style=True, width=1_000_000).strip()
    return str(value)


@cache
def _fields() -> tuple[FormField, ...]:
    return tuple(_made())


def _made() -> Iterator[FormField]:
    models = sections()
    for section, _, keys in listed_sections():
        properties = models[section].model_json_schema()["properties"]
        for key in keys:
            name = key.name.partition(".")[2]
            choices = _choices(key.kind)
            advice = GUIDE.get(key.name)
            yield FormField(
                key.name,
                _input(key.kind, choices),
                key.kind,
                key.default,
                key.help,
                _bounds(properties[name]),
                advice.usual if advice else "",
                choices,
            )


def _choices(kind: str) -> tuple[str, ...]:
    if kind == "true/false":
        return ("true", "false")
    if kind == "true/false or auto":
        return ("auto", "true", "false")
    return tuple(part.strip() for part in kind.split("|")) if "|" in kind else ()


def _input(kind: str, choices: tuple[str, ...]) -> Input:
    if choices:
        return "choice"
    if kind == "string or list":
        return "lines"
    if kind == "mapping":
        return "mapping"
    return "number" if kind in ("number", "whole number") else "text"


def _bounds(schema: Mapping[str, Any]) -> str:
    parts = [schema, *schema.get("anyOf", ())]
    found = [
        f"{sign} {_number(part[name])}" for part in parts for name, sign in _BOUNDS.items() if name in part
    ]
    return ", ".join(dict.fromkeys(found))


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:g}"
