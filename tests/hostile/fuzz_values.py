"""Any data, as hypothesis draws it: JSON values, rows, files of rows, texts, settings, recipes."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from typing import Any

import yaml
from hypothesis import strategies as st
from tests.data.toy_tokenizers import hostile_text

from lorafit.config.schema import keys
from lorafit.data.formats import FORMATS

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".json.gz", ".jsonl.gz")
ESCAPES = (
    "\x1b[2J",
    "\x1b]0;x\x07",
    "\u202e",
    "\r",
    "\0",
    "\ud800",
    "\udfff",
    "\ufdd0",
    "\ufdd3",
    "\ufffe",
    "\u2028",
)

# Every character that Python has, lone surrogates, noncharacters and NUL among them.
any_text = st.text(max_size=20) | hostile_text
any_text |= st.lists(
    st.sampled_from(ESCAPES)
    | hostile_text
    | st.text(st.characters(categories=("Cs", "Cn", "Co", "Cc", "Cf", "Zl"))),
    max_size=5,
).map("".join)
scalars = (
    st.none() | st.booleans() | st.integers() | st.integers(-(10**400), 10**400) | st.floats() | any_text
)
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(any_text, inner, max_size=4),
    max_leaves=12,
)


def mostly(good: st.SearchStrategy[Any], bad: st.SearchStrategy[Any] = json_values) -> st.SearchStrategy[Any]:
    """Nine times in ten `good`."""
    return st.integers(0, 9).flatmap(lambda number: bad if number == 9 else good)


_said_text = mostly(hostile_text, any_text)
_names = ["instruction", "input", "output", "system", "messages", "conversations", "conversation", "prompt"]
_names += ["completion", "text", "role", "content", "from", "value", "tools", "name"]
_roles = st.sampled_from(
    ["system", "user", "assistant", "human", "gpt", "tool", "function_call", "ipython", "USER", ""]
)
_turn = st.fixed_dictionaries({"role": mostly(_roles), "content": mostly(_said_text)})
_said = st.fixed_dictionaries({"from": mostly(_roles), "value": mostly(_said_text)})
_alpaca = st.fixed_dictionaries(
    {"instruction": mostly(_said_text), "output": mostly(_said_text)},
    optional={"input": mostly(_said_text), "system": mostly(_said_text)},
)
_rows = [
    _alpaca,
    st.fixed_dictionaries({"messages": mostly(st.lists(mostly(_turn), max_size=5))}),
    st.fixed_dictionaries({"conversations": mostly(st.lists(mostly(_said), max_size=5))}),
    st.fixed_dictionaries({"prompt": mostly(_said_text), "completion": mostly(_said_text)}),
    st.fixed_dictionaries({"text": mostly(_said_text)}),
    st.dictionaries(st.sampled_from(_names) | any_text, json_values, max_size=5),
    json_values,
]
rows = st.one_of(_rows)
_formats = mostly(st.just("auto"), st.sampled_from(list(FORMATS))) | st.sampled_from(list(FORMATS))
_which = st.integers(0, 255)  # of the renderers
row_files = st.tuples(
    _formats,
    st.lists(rows, max_size=3)
    | st.one_of([st.lists(kind, min_size=1, max_size=3) for kind in _rows])
    | json_values,
    _which,
)
# A conversation or an instruction, well formed; its texts are anything.
conversations = st.tuples(
    st.lists(st.tuples(any_text, any_text), min_size=1, max_size=3), any_text, st.booleans(), _which
)


def spoilt(good: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Some bytes cut out, and others put in."""
    return st.tuples(good, st.integers(0, 1 << 12), st.integers(0, 8), st.binary(max_size=8)).map(_spliced)


def _spliced(drawn: tuple[bytes, int, int, bytes]) -> bytes:
    content, at, length, new = drawn
    at %= len(content) + 1
    return content[:at] + new + content[at + length :]


def _csv(table: Sequence[Sequence[str]], separator: str) -> bytes:
    return "\n".join(separator.join(cells) for cells in table).encode(errors="surrogatepass")


def _lines(values: Sequence[Any]) -> bytes:
    return "\n".join(map(json.dumps, values)).encode()


_cells = (
    st.sampled_from(["instruction", "output", "text", "prompt", "completion", '"a, b"', '"', "", "x"])
    | any_text
)
_contents = st.one_of(
    st.binary(max_size=200),
    st.lists(rows, max_size=3).map(lambda value: json.dumps(value).encode()),
    st.lists(rows, max_size=3).map(_lines),
    st.tuples(st.lists(st.lists(_cells, max_size=4), max_size=4), st.sampled_from(",\t")).map(
        lambda drawn: _csv(*drawn)
    ),
    st.integers(0, 3000).map(lambda depth: b"[" * depth + b'{"text": "x"}' + b"]" * depth),
    st.sampled_from(["utf-16", "utf-8-sig", "utf-32"]).map(lambda name: '[{"text": "x"}]'.encode(name)),
)
_packed = _contents.map(lambda content: gzip.compress(content, 1, mtime=0))
_mixed = st.one_of(
    _contents, spoilt(_contents), _packed, spoilt(_packed), st.tuples(_packed, _packed).map(b"".join)
)
_objects = st.one_of([st.lists(kind, min_size=1, max_size=3) for kind in _rows[:5]])


def _file(suffix: str) -> st.SearchStrategy[bytes]:
    """A file that is what its name says."""
    if suffix in (".csv", ".tsv"):
        cell = hostile_text.map(lambda text: '"' + text.replace('"', '""') + '"')
        lines = st.lists(st.lists(cell, min_size=2, max_size=2), min_size=1, max_size=3)
        separator = "," if suffix == ".csv" else "\t"
        return lines.map(lambda table: _csv([["instruction", "output"], *table], separator))
    one = ".jsonl" not in suffix and ".ndjson" not in suffix
    made = _objects.map(lambda value: json.dumps(value).encode() if one else _lines(value))
    return made.map(lambda content: gzip.compress(content, 1, mtime=0)) if suffix.endswith(".gz") else made


_whole = st.sampled_from(SUFFIXES).flatmap(
    lambda suffix: st.tuples(st.just(suffix), _formats, _file(suffix) | spoilt(_file(suffix)), _which)
)
files = _whole | st.tuples(st.sampled_from(SUFFIXES), _formats, _mixed, _which)

KEYS = sorted(keys())
_near = st.tuples(st.sampled_from(KEYS), st.integers(0, 40), st.sampled_from(["", ".", "x", "_", " "])).map(
    lambda drawn: drawn[0][: drawn[1]] + drawn[2] + drawn[0][drawn[1] + 1 :]
)
WORDS = [
    "auto",
    "none",
    "1",
    "0",
    "-1",
    "1e-4",
    ".inf",
    ".nan",
    "1e999",
    "9" * 5000,
    "true",
    "null",
    "~",
    "[a, b]",
]
WORDS += [
    "{a: 1}",
    "epoch",
    "float32",
    "cuda:99",
    "re:(",
    "re:.*",
    "a=b",
    "*a",
    "&a [*a]",
    "!!python/name:os",
    "'",
]
WORDS += [
    "2026-13-45",
    "0x",
    "0o9",
    "1:2:3",
    "hf_" + "a" * 34,
    "? : -",
    "[[[[",
    "{}",
    "chat",
    "all-linear",
    "../..",
]
setting_values = st.sampled_from(WORDS) | st.floats().map(str) | st.integers().map(str) | any_text
_fine = ["lora.rank=8", "train.epochs=0.5", "data.max_length=64", "run.samples=0", "train.schedule=linear"]
_fine += [
    "data.holdout=0.1",
    "train.eval_every=epoch",
    "data.template=chat",
    "lora.alpha=3",
    "data.weights=[2]",
]
overrides = st.lists(
    st.sampled_from(_fine)
    | st.sampled_from(_fine)
    | st.tuples(
        mostly(st.sampled_from(KEYS), _near | any_text),
        st.sampled_from(["=", "=", "=", "", "=="]),
        setting_values,
    ).map("".join)
    | any_text,
    max_size=3,
).map(lambda given: ["model.name=m", "data.path=d.json", *given])

_sections: dict[str, list[str]] = {}
for _key in KEYS:
    _sections.setdefault(_key.partition(".")[0], []).append(_key.partition(".")[2])
_any_value = (
    json_values
    | st.sampled_from(WORDS)
    | st.dates()
    | st.binary(max_size=5)
    | st.sampled_from([0, 1, 16, 0.5])
)
_nested = st.fixed_dictionaries(
    {
        "model": mostly(st.fixed_dictionaries({"name": mostly(st.just("m"), _any_value)}), _any_value),
        "data": mostly(st.fixed_dictionaries({"path": mostly(st.just("d.json"), _any_value)}), _any_value),
    },
    optional={
        name: mostly(
            st.dictionaries(mostly(st.sampled_from(found), any_text), _any_value, max_size=4), _any_value
        )
        for name, found in _sections.items()
        if name not in ("model", "data")
    },
)
configs = mostly(_nested, st.dictionaries(scalars, json_values, max_size=4) | json_values)


def _as_yaml(value: Any) -> str:
    try:
        return str(yaml.safe_dump(value, allow_unicode=True))
    except (ValueError, yaml.YAMLError):  # integers and characters that YAML does not have
        return str(value)


_yaml_words = [
    "model:",
    "  name: m",
    "lora:",
    "\n",
    "\n  ",
    "- ",
    "? ",
    ": ",
    "|",
    ">",
    "&a",
    "*a",
    "!!",
    "!!set",
    "<<: ",
]
_yaml_words += [
    "[",
    "]",
    "{",
    "}",
    "---",
    "...",
    "%YAML 9.9\n",
    "#",
    "'",
    '"',
    "\\x",
    "\t",
    "!!binary ",
    "=",
    "!!omap",
]
recipes = st.one_of(
    any_text,
    _nested.map(lambda value: json.dumps(value, default=str)),
    _nested.map(_as_yaml),
    st.lists(st.sampled_from(_yaml_words) | st.sampled_from(WORDS) | st.sampled_from(KEYS), max_size=16).map(
        "".join
    ),
    st.sampled_from([9, 300, 4000]).map(lambda depth: "[" * depth) | any_text,
)
