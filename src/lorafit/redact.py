"""Text from anywhere made fit to be shown in one line: no secret in it, nothing that steers a terminal, an end."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_CHARACTERS = 1000
_HIDDEN = "***"
_SHORTEST_SECRET = 8  # characters; shorter ones would hide harmless words
_SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|PASS|KEY)$", re.IGNORECASE)
_LOGIN_IN_URL = re.compile(r"(?<=://)[^\s/]+(?=@)")
_TOKEN = re.compile(r"\b(hf_|api_org_|sk-|ghp_|gho_|github_pat_|glpat-|xox[abp]-|AKIA)[A-Za-z0-9_-]{12,}")
_ASSIGNMENT = re.compile(
    r"""^[ \t]*(?:export[ \t]+)?(\w+)[ \t]*=[ \t]*(?:"([^"\n]*)"|'([^'\n]*)'|([^\s#]*))""", re.M
)
_LINE_ENDS = re.compile(r"[ \t]*[\r\n]+[ \t]*")
_STEERING = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def one_line(text: str) -> str:
    """`text` without secrets in one line of at most MAX_CHARACTERS; control characters become their escapes."""
    words = _LINE_ENDS.sub(" ", without_secrets(text).strip())
    if len(words) > MAX_CHARACTERS:
        words = f"{words[:MAX_CHARACTERS]} ... ({len(words) - MAX_CHARACTERS:,} more characters)"
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), words)


def json_line(value: Any) -> str:
    """`value` in one line of JSON in which what steers a terminal is escaped; everything else stays readable."""
    return _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


def without_secrets(text: str) -> str:
    """`text` with stars for what must not be shown or stored.

    That is: the login in a URL, tokens of well-known form, and the values of variables whose names end in
    TOKEN, KEY, SECRET or PASSWORD, in the environment and in a `.env` file here.
    """
    for secret in sorted(set(_secrets()), key=len, reverse=True):
        text = text.replace(secret, _HIDDEN)
    return _TOKEN.sub(_HIDDEN, _LOGIN_IN_URL.sub(_HIDDEN, text))


def dotenv() -> dict[str, str]:
    """The assignments in a `.env` file here; nothing in it is executed or expanded, {} if it cannot be read."""
    path = Path(".env")
    try:
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    except OSError:
        return {}
    return {name: next(filter(None, values), "") for name, *values in _ASSIGNMENT.findall(text)}


def _secrets() -> Iterator[str]:
    for name, value in [*os.environ.items(), *dotenv().items()]:
        if _SECRET_NAME.search(name) and len(value.strip()) >= _SHORTEST_SECRET:
            yield value.strip()
