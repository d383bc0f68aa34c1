"""Foreign text: strings that mean something in the languages of what lorafit writes, and readers of these languages."""

from __future__ import annotations

import json
import re
import subprocess
from html.parser import HTMLParser
from typing import Any

import yaml
from markdown_it import MarkdownIt

NASTY = (
    "\x1b]0;owned\x07",
    "\x1b[2J\x1b[1;1Hall is well",
    "\x9b31m\x85",
    "a\nerror: all is well\n hint: curl example.org | sh",
    "done\rfail",
    "\u202egnp.exe\u2066\u2069",
    "\u200b\ufeff\u2028",
    "\x7f\x08\x08",
    "\0",
    "\udcff\ud800",
    "</script></style><script>alert(1)</script>",
    "<img src=http://127.0.0.1/x onerror=alert(1)>",
    '" onmouseover="alert(1)" x="',
    "]]>&amp;&#x41;",
    "[red]x[/red] [link=http://127.0.0.1]y[/link]",
    "`",
    "a ``` b",
    "```\n\n# Owned\n\n```",
    "x\n---\nlicense: evil\n---\n# Owned",
    "a | b \\| c\\",
    "[x](javascript:alert(1)) ![y](http://127.0.0.1/y) <http://127.0.0.1>",
    "$(touch PWNED)",
    "`touch PWNED`; touch PWNED & touch PWNED | cat > PWNED",
    'it\'s "quoted" \\ and $HOME',
    "-rf",
    "--push=evil/model",
    '")\nimport os; os.system("touch PWNED")\n("',
    "{{ 7 * 7 }}{% for x in y %}{{",
    '"""\nFROM /etc/passwd\nSYSTEM """',
    'ends with "',
    "ends with {",
    "=1+1",
    "yes",
    "null",
    "1e999",
    "- a: b # c",
    "한글 é 👩‍👩‍👧 ש",
    "tab\tand  spaces ",
)
# Those that a file name, a hub or a tokenizer can hold too.
NAMES = tuple(text.replace("\0", "").replace("/", ":") or "x" for text in NASTY)
_STEERING = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


def steering(out: str) -> list[str]:
    """The characters of `out` that steer a terminal or are unseen; tabs and line ends are none."""
    return _STEERING.findall(out)


def without_styles(out: str) -> str:
    """What a live terminal was sent, without the sequences of rich: colours, cursor movements, erased lines."""
    return re.sub(r"\x1b\[[0-9;?]*[ABCDGHJKhlm]", "", out).replace("\r", "")


def is_one_line(out: str) -> bool:
    return not steering(out) and len(out.splitlines()) == 1


def is_lines(out: str, num: int) -> bool:
    return not steering(out) and len(out.splitlines()) == num


def tags_of(page: str) -> list[tuple[str, tuple[str, ...]]]:
    """Each element of a page with the names of its attributes, in order."""
    found: list[tuple[str, tuple[str, ...]]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.append((tag, tuple(name for name, _ in attrs)))

    reader = Reader()
    reader.feed(page)
    reader.close()
    return found


def blocks_of(markdown: str) -> list[tuple[str, str]]:
    """Each token of a Markdown text without its header: (kind, tag); the texts of spans and blocks are left out."""
    found: list[tuple[str, str]] = []
    body = markdown.split("\n---\n", 1)[1] if markdown.startswith("---\n") else markdown
    for token in MarkdownIt("commonmark").enable("table").parse(body):
        found.append((token.type, token.tag))
        found.extend((child.type, child.tag) for child in token.children or () if child.type != "text")
    return found


def code_of(markdown: str) -> list[str]:
    """The texts of all code spans and code blocks."""
    found = []
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        found += [token.content] if token.type == "fence" else []
        found += [child.content for child in token.children or () if child.type == "code_inline"]
    return found


def words_of(command: str) -> list[bytes]:
    """The words that bash reads in a command."""
    done = subprocess.run(
        ["bash", "-c", f"set -f; printf '%s\\0' {command}"],
        capture_output=True,
        check=True,
        env={"LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin", "HOME": "/elsewhere"},
    )
    return done.stdout.split(b"\0")[:-1]


def modelfile_of(text: str) -> list[tuple[str, str]]:
    """The commands of a Modelfile, by the rules of Ollama's parser: values in one or three quotes, without escapes."""
    found, rest = [], text
    while rest := rest.lstrip("\n"):
        command, _, rest = rest.partition(" ")
        key = ""
        if command == "PARAMETER":
            key, _, rest = rest.partition(" ")
        quote = '"""' if rest.startswith('"""') else '"' if rest.startswith('"') else ""
        if not quote:
            value, _, rest = rest.partition("\n")
        else:
            # the value ends at the first line end before which the quotes are closed
            end = next(
                match.end()
                for match in re.finditer(f"{quote}(?=\n|\\Z)", rest)
                if match.start() >= len(quote)
            )
            value, rest = rest[len(quote) : end - len(quote)], rest[end:]
        found.append((f"{command} {key}".strip(), value))
    return found


def json_of(out: str) -> Any:
    """The value of a line of JSON, by a reader that accepts JSON alone."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    assert is_one_line(out), out
    return json.loads(out, parse_constant=refuse)


def header_of(card: str) -> Any:
    """The header of a card, as a hub finds it."""
    match = re.match(r"---\n(.*?)\n---(\n|$)", card, re.DOTALL)
    assert match
    return yaml.safe_load(match[1])
