"""Text made safe to show and to store: without secrets, and without characters that steer a terminal or are unseen."""

from __future__ import annotations

import html
import json
import logging
import math
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import quote

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
    r"(?:hf[_-]|api_org_|sk[_-])(?=[A-Za-z0-9_-]{0,200}?(?:[A-Za-z0-9]{16}|(?=[A-Za-z0-9]{12})[a-z]*[A-Z0-9]))"
    r"[A-Za-z0-9_-]{12,})"
)
# The parts of a line of `.env`, in the grammar of python-dotenv: https://github.com/theskumar/python-dotenv
_KEY = re.compile(r"\s*(?:export[^\S\r\n]+)?(?:'([^']+)'|((?!')[^=#\s]+))?[^\S\r\n]*")
_VALUE = re.compile(
    r"""=(?:[^\S\r\n]+(?=\#) | [^\S\r\n]*
    (?:'((?:\\.|[^'\\])*)' | "((?:\\.|[^"\\])*)" | ((?![\s'"])[^\r\n]* | (?=[\r\n]|\Z))))""",
    re.VERBOSE | re.DOTALL,
)
_END = re.compile(r"(?:[^\S\r\n]*#[^\r\n]*)?[^\S\r\n]*(?:[\r\n]|\Z)")
_REST = re.compile(r"[^\r\n]*[\r\n]?")
_ESCAPES = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_EXPANSION = re.compile(r"\$\{([^}:]*)(?::-([^}]*))?\}")
_MAX_DOTENV = 1 << 20  # characters
_LINE_ENDS = re.compile(r"(?<![ \t])[ \t]*[\r\n]+[ \t]*")
_ESCAPE_SEQUENCES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b.", re.DOTALL
)
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
    return _hidden(text, _known())


def without_secrets(value: Any) -> Any:
    """A JSON value with `redact` applied to each text in it, keys too: before it is encoded, which changes texts."""
    known = _known()

    def cleaned(value: Any) -> Any:
        if isinstance(value, str):
            return _hidden(value, known)
        if isinstance(value, Mapping):
            return {cleaned(key): cleaned(item) for key, item in value.items()}
        return [cleaned(item) for item in value] if isinstance(value, list | tuple) else value

    return cleaned(value)


def _hidden(text: str, secrets: Sequence[str]) -> str:
    for secret in secrets:
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, _HIDDEN)
        elif secret in text:
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


def line(text: object) -> str:
    """`text` without secrets as one whole line: line ends, unseen and steering characters are escaped."""
    return lines([text])[0]


def lines(texts: Iterable[object]) -> list[str]:
    """Each of `texts` as `line` has it; the secrets are looked up once."""
    known = _known()
    hidden = (_hidden(str(text), known).replace("\n", "\\n").replace("\t", "\\t") for text in texts)
    return [_UNSEEN.sub(_escape, text) for text in hidden]


def shell(*words: object) -> str:
    """`words` as a command for a shell, in one line. A word with unseen characters has the form `$'...'` of bash."""
    return " ".join(map(_shell_word, map(str, words)))


def _shell_word(word: str) -> str:
    if not (_UNSEEN.search(word) or "\n" in word or "\t" in word):
        return shlex.quote(word)
    escaped = word.replace("\\", r"\\").replace("'", r"\'").replace("\n", r"\n").replace("\t", r"\t")
    return f"$'{_UNSEEN.sub(_escape_byte, escaped)}'"


def json_line(value: Any) -> str:
    """`value` in one line of JSON, without secrets, for a script. Numbers that JSON does not have become null.

    Unseen and steering characters are escaped, all others stay readable.
    """
    text = json.dumps(_finite(without_secrets(value)), ensure_ascii=False, allow_nan=False)
    return _UNSEEN.sub(_escape, text)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


class _Lines(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = line(record.getMessage()), ()
        return True


def logger_of(module: str) -> logging.Logger:
    """The logger of a module. Its messages are made lines: without a set-up, logging prints them as they are."""
    logger = logging.getLogger(module)
    logger.addFilter(_Lines())
    return logger


def dotenv() -> dict[str, str]:
    """The assignments of `.env` in the current folder as python-dotenv reads them, {} if it cannot be read."""
    path = Path(".env")
    try:
        with path.open(encoding="utf-8", errors="replace") if path.is_file() else nullcontext() as file:
            text = file.read(_MAX_DOTENV) if file else ""
    except OSError:
        return {}
    found: dict[str, str] = {}
    for name, value in _assignments(text):
        found[name] = _expanded(value or "", found | os.environ)
        if value is None:  # a name alone
            del found[name]
    return found


def _expanded(value: str, known: Mapping[str, str]) -> str:
    return _EXPANSION.sub(lambda part: known.get(part[1], part[2] or ""), value)


def _assignments(text: str) -> Iterator[tuple[str, str | None]]:
    at = 0
    while at < len(text):
        key, value, at = _match(_KEY, text, at), None, _match(_KEY, text, at).end()
        if name := key[1] or key[2]:
            if is_assigned := text.startswith("=", at):
                value = _VALUE.match(text, at)
                at = value.end() if value else at
            if (end := _END.match(text, at)) and (value or not is_assigned):
                yield name, _unquoted(value) if value else None
            at = (end or _match(_REST, text, at)).end()
        else:
            at = _match(_REST, text, at).end()


def _match(pattern: re.Pattern[str], text: str, at: int) -> re.Match[str]:
    """The match of a pattern that matches everywhere."""
    found = pattern.match(text, at)
    assert found is not None
    return found


def _unquoted(value: re.Match[str]) -> str:
    single, double, plain = value.groups()
    if single is not None:
        return re.sub(r"\\([\\'])", r"\1", single)
    if double is not None:
        return re.sub(r"""\\([\\'"abfnrtv])""", lambda part: _ESCAPES.get(part[1], part[1]), double)
    return re.sub(r"\s+#.*", "", plain or "").rstrip()


def _escape(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"


def _escape_byte(match: re.Match[str]) -> str:
    """For `$'...'`; a byte of a file name that is no text is a lone surrogate here."""
    number = ord(match[0])
    return f"\\x{number - 0xDC00:02x}" if 0xDC80 <= number <= 0xDCFF else f"\\u{number:04x}"


def _known() -> list[str]:
    """The secrets, as they are and as other text encodes them, longest first."""
    return sorted({form for secret in _secrets() for form in _forms(secret)}, key=len, reverse=True)


def _forms(secret: str) -> Iterator[str]:
    """`secret` as it is, and in JSON, Python, HTML, a URL and a shell's command."""
    yield from (secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1])
    yield from (repr(secret)[1:-1], html.escape(secret), quote(secret, safe=""), quote(secret))
    yield shlex.quote(secret).removeprefix("'").removesuffix("'")


def _secrets() -> Iterator[str]:
    for name, value in [*os.environ.items(), *dotenv().items()]:
        value = value.strip()
        if not _SECRET_NAME.search(name) or _NAME_OF_A_PATH.search(name):
            continue
        is_word = value.isalpha() or value.isdigit()
        if len(value) >= (_SHORTEST_SECRET if is_word else _SHORTEST_ODD_SECRET):
            yield value
