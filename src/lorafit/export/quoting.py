"""Foreign names and texts in a model card: each is quoted for Markdown, YAML or the language of a code block."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from lorafit.redact import line, visible, without_secrets


def code(text: str) -> str:
    """A code span of Markdown, in one line: nothing in it is markup, a link or HTML. Also for the cell of a table."""
    shown = line(text) or " "
    ticks = _longer_than_in(shown, 1)
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{ticks}{space}{shown}{space}{ticks}"


def fenced(text: str, language: str) -> str:
    """A code block of Markdown, which no line of `text` ends."""
    ticks, shown = _longer_than_in(text, 3), visible(text)
    end = "" if shown.endswith("\n") else "\n"
    return f"{ticks}{language}\n{shown}{end}{ticks}"


def yaml_text(value: Mapping[str, Any], **settings: Any) -> str:
    """`value` as YAML without secrets; in ASCII where a character is unseen or changes the direction of text."""
    cleaned = without_secrets(value)
    text = str(yaml.safe_dump(cleaned, sort_keys=False, allow_unicode=True, **settings))
    return text if visible(text) == text else str(yaml.safe_dump(cleaned, sort_keys=False, **settings))


def _longer_than_in(text: str, least: int) -> str:
    """Backticks, at least so many, and more than `text` has one after the other."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))
