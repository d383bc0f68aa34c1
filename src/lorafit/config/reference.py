"""The configuration reference, generated from the schema: a Markdown page and a plain listing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lorafit.config import fields, schema
from lorafit.config.guide import GUIDE


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the schema as text."""

    name: str
    kind: str
    default: str
    help: str


def sections() -> Iterator[tuple[str, str, list[Key]]]:
    """(section name, what it is for, its keys), in the schema's order."""
    for section, model in schema.sections().items():
        keys = [_key(section, name, info) for name, info in model.model_fields.items()]
        yield section, (model.__doc__ or "").strip(), keys


def markdown() -> str:
    """`docs/config.md`, whole."""
    lines = [
        "# Configuration",
        "",
        "<!-- Generated from src/lorafit/config/schema.py by `make docs`; a test compares the two. -->",
        "",
        "A run is a recipe file plus `section.key=value` overrides plus the common flags; what they add up to is",
        "written to `config.yaml` in the run directory. An unknown key is an error with the nearest name.",
    ]
    for section, purpose, keys in sections():
        lines += ["", f"## {section}", "", purpose, "", "| key | type | default | what it does |"]
        lines.append("| --- | --- | --- | --- |")
        for key in keys:
            kind = key.kind.replace("|", "\\|")
            lines.append(f"| `{key.name}` | {kind} | `{key.default}` | {key.help} |")
    return "\n".join(lines) + "\n"


def settings_table() -> str:
    """The table of docs/settings.md: the keys that matter most, with the first sentence of their descriptions."""
    helps = {
        key.name: key.help.partition(". ")[0].rstrip(".") for _, _, listed in sections() for key in listed
    }
    lines = ["| key | what it does | usual | when to change it |", "| --- | --- | --- | --- |"]
    for name, advice in GUIDE.items():
        lines.append(f"| `{name}` | {helps[name]} | {advice.usual} | {advice.change} |")
    return "\n".join(lines) + "\n"


def _key(section: str, name: str, info: FieldInfo) -> Key:
    default = info.get_default()
    if default is PydanticUndefined:
        shown = "(required)"
    elif default == fields.AUTO:
        shown = "auto"
    elif name.endswith("_every") and default == 0:
        shown = "epoch"
    elif isinstance(default, tuple):
        shown = ", ".join(default) or "(none)"
    elif default is None or default in ("", {}):
        shown = "(none)"
    else:
        shown = str(default).lower() if isinstance(default, bool) else f"{default}"
    return Key(f"{section}.{name}", _kind(name, info), shown, info.description or "")


def _kind(name: str, info: FieldInfo) -> str:
    if fields.OrAuto in info.metadata:
        return f"{_number(name, info)} or auto"
    return _number(name, info)


def _number(name: str, info: FieldInfo) -> str:
    text = str(info.annotation)
    if choices := re.findall(r"Literal\[([^\]]*)\]", text):
        return " | ".join(part.strip(" '\"") for part in choices[0].split(","))
    if name.endswith("_every"):
        return "steps or epoch"
    if "dict[" in text:
        return "mapping"
    if "tuple[str" in text:
        return "string or list"
    if "tuple[" in text:
        return "list of numbers"
    for kind, shown in (("bool", "true/false"), ("float", "number"), ("int", "whole number")):
        if kind in text:
            return shown
    return "string"
