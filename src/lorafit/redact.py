"""Text made safe to show and to store: without secrets, and without characters that steer a terminal or are unseen."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_CHARACTERS = 1000
_HIDDEN = "***"
_SHORTEST_SECRET = 8  # characters; a shorter value could be an ordinary word
_SHORTEST_ODD_SECRET = 6  # of a value that has letters and other characters; replaced only as a whole word
_SECRET_NAME = re.compile(
    r"SECRET|PASSW|PASSPHRASE|CREDENTIAL|(?:TOKEN|KEY|(?<!ASK)PASS)S?(?=\d*(?:_|$))", re.IGNORECASE
)
_NAME_OF_A_PATH = re.compile(r"_(?:FILE|PATH|DIR)$", re.IGNORECASE)
_LOGIN_IN_URL = re.compile(r"(?<=://)[^\s/]+(?=@)")
# A prefix starts a word; `\n` in an escaped text is not a part of it. Prefixes that also begin ordinary names
# (`sk-learn-pipelines`, `hf_hub_download`) count only before a run of characters that is not a word.
_TOKEN = re.compile(
    r"(?:(?<![A-Za-z0-9])|(?<=\\[nrt]))(?:"
    r"(?:github_pat_|gh[pousr]_|glpat-|xox[abeprs]-)[A-Za-z0-9_-]{12,}|(?:AKIA|ASIA)[A-Z0-9]{12,}|"
    r"(?:hf[_-]|api_org_|sk[_-])(?=[A-Za-z0-9_-]*?(?:[A-Za-z0-9]{16}|(?=[A-Za-z0-9]{12})[a-z]*[A-Z0-9]))"
    r"[A-Za-z0-9_-]{12,})"
)
_ASSIGNMENT = re.compile(
    r"""^[ \t]*(?:export[ \t]+)?(\w+)[ \t]*=[ \t]*(?:"([^"\n]*)"|'([^'\n]*)'|([^\s#]*))""", re.M
)
_LINE_ENDS = re.compile(r"[ \t]*[\r\n]+[ \t]*")
_ESCAPE_SEQUENCES = re.compile(r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b\].*?(?:\x07|\x1b\\)|\x1b.", re.DOTALL)
# Control characters but tab and line feed, zero-width characters but the joiners of scripts and emoji, marks that
# change the direction of text, Unicode's own line ends, lone surrogates, and code points that are no characters.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"
    "\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)


def redact(text: str) -> str:
    """`text` with `***` in place of each secret: the one filter of logs, pages, recipes, checkpoints and cards.

    A secret is the login in a URL, a token of well-known form, and the value of a variable of the environment or of
    `.env` in the current folder whose name says so (TOKEN, KEY, SECRET, PASSWORD, PASS, CREDENTIALS, ...).
    """
    for secret in sorted(set(_secrets()), key=len, reverse=True):
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, _HIDDEN)
        else:
            text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", _HIDDEN, text)
    return _TOKEN.sub(_HIDDEN, _LOGIN_IN_URL.sub(_HIDDEN, text))


def visible(text: str) -> str:
    """`text` with each unseen or steering character as its number, `<U+202E>`. Line ends and tabs stay."""
    return _UNSEEN.sub(lambda match: f"<U+{ord(match[0]):04X}>", text)


def printable(text: str) -> str:
    """`text` without escape sequences and without unseen or steering characters. Line ends and tabs stay."""
    return _UNSEEN.sub("", _ESCAPE_SEQUENCES.sub("", text.replace("\r\n", "\n")))


def one_line(text: str) -> str:
    """`text` without secrets in one line of at most MAX_CHARACTERS; unseen and steering characters are escaped."""
    line = _LINE_ENDS.sub(" ", redact(text).strip())
    if len(line) > MAX_CHARACTERS:
        line = f"{line[:MAX_CHARACTERS]} ... ({len(line) - MAX_CHARACTERS:,} more characters)"
    return _UNSEEN.sub(_escape, line.replace("\t", "\\t"))


def json_line(value: Any) -> str:
    """`value` in one line of JSON; unseen and steering characters are escaped, all others stay readable."""
    return _UNSEEN.sub(_escape, json.dumps(value, ensure_ascii=False))


def dotenv() -> dict[str, str]:
    """The assignments of `.env` in the current folder, {} if it cannot be read. Nothing is executed or expanded."""
    path = Path(".env")
    try:
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    except OSError:
        return {}
    return {name: next(filter(None, values), "") for name, *values in _ASSIGNMENT.findall(text)}


def _escape(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"


def _secrets() -> Iterator[str]:
    for name, value in [*os.environ.items(), *dotenv().items()]:
        value = value.strip()
        if not _SECRET_NAME.search(name) or _NAME_OF_A_PATH.search(name):
            continue
        is_word = value.isalpha() or value.isdigit()
        if len(value) >= (_SHORTEST_SECRET if is_word else _SHORTEST_ODD_SECRET):
            yield value
