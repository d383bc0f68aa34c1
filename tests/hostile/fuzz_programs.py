"""Anything that is a program or its traces, as hypothesis draws it: words of a command, chat templates, run files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from tests.data.toy_tokenizers import CHATML, LLAMA_2, LLAMA_3, QWEN_3, VICUNA, ZEPHYR
from tests.hostile.fuzz_values import KEYS, WORDS, any_text, conversations, json_values, spoilt

TEMPLATES = (CHATML, ZEPHYR, LLAMA_2, LLAMA_3, QWEN_3, VICUNA)
_verbs = [
    "train",
    "check",
    "show",
    "plan",
    "generate",
    "report",
    "chat",
    "serve",
    "export",
    "eval",
    "runs",
    "sweep",
]
_verbs += ["config", "traim", ""]
_flags = [
    "--model",
    "--data",
    "--output",
    "--recipe",
    "--auto",
    "--resume",
    "--json",
    "--vary",
    "--random",
    "--jobs",
]
_flags += [
    "--markdown",
    "--max-tokens",
    "--temperature",
    "--seed",
    "--quiet",
    "--adapter",
    "--port",
    "--to",
    "--nproc",
]
_flags += [
    "--help",
    "-h",
    "--version",
    "--",
    "-",
    "--no",
    "--data=",
    "--samples",
    "--row",
    "--limit",
    "--format",
]
_given = [
    "missing",
    "missing.yaml",
    "rows.json",
    "empty",
    "owner/name",
    "0",
    "-1",
    "1e9",
    "lora.rank=0",
    "alpaca",
]
_given += [
    "lora.rank=1..8",
    "train.learning_rate=1e-5..1e-3",
    "lora.rank=8,16",
    "model.name=m",
    "data.path=rows.json",
]
_word = (
    st.sampled_from(_flags)
    | st.sampled_from(_given)
    | st.sampled_from(WORDS)
    | st.sampled_from(KEYS)
    | any_text
)
# No argument of a process holds NUL; `/` and `../` would have `runs` look through this machine.
_argument = _word.map(lambda text: text.encode(errors="surrogatepass").decode(errors="surrogateescape")).map(
    lambda text: text.replace("\0", "").replace("../", "").lstrip("/~")
)
arguments = st.tuples(
    st.sampled_from(_verbs) | any_text.map(lambda text: text.replace("\0", "")),
    st.lists(_argument, max_size=6),
).map(lambda drawn: [drawn[0], *drawn[1]])

_atoms = st.sampled_from(
    [
        "messages",
        "message",
        "message['content']",
        "message.role",
        "loop",
        "loop.index0",
        "bos_token",
        "eos_token",
        "x",
        "messages[0]",
        "messages[-1].content",
        "add_generation_prompt",
        "'a'",
        '"<|im_end|>\\n"',
        "1",
        "-1",
        "10**9",
        "none",
        "true",
        "[]",
        "{}",
        "[1, 2]",
        "{'a': x}",
        "''.__class__",
        "range(99999)",
        "namespace(a=1)",
        "self",
        "tools",
        "cycler",
        "strftime_now('%Y')",
        "raise_exception('no')",
        "dict(a=1)",
        "joiner()",
        "lipsum()",
        "messages|length",
        "x.a.b",
        "1.5",
    ]
)
_filters = [
    "trim",
    "length",
    "upper",
    "join",
    "tojson",
    "list",
    "sort",
    "map('upper')",
    "string",
    "int",
    "default('a')",
]
_filters += [
    "center(99999999)",
    "indent(4)",
    "replace('a', 'bb')",
    "first",
    "attr('__class__')",
    "batch(2)",
    "xmlattr",
]
_filters += [
    "reverse",
    "unique",
    "format(1)",
    "dictsort",
    "groupby('a')",
    "sum",
    "nothing",
    "select('odd')",
    "wordwrap(1)",
]
_expressions = st.recursive(
    _atoms,
    lambda inner: st.one_of(
        st.tuples(
            inner,
            st.sampled_from(["+", "~", "*", "==", "in", "and", "or", "//", "%", "**", "is", "<", "if"]),
            inner,
        ).map(lambda drawn: f"({drawn[0]} {drawn[1]} {drawn[2]})"),
        st.tuples(inner, st.sampled_from(_filters)).map(lambda drawn: f"({drawn[0]} | {drawn[1]})"),
        st.tuples(inner, inner).map(lambda drawn: f"{drawn[0]}[{drawn[1]}]"),
        st.tuples(
            inner,
            st.sampled_from(
                ["strip()", "split('a')", "format(1)", "keys()", "items()", "join(x)", "a", "get(1)"]
            ),
        ).map(lambda drawn: f"{drawn[0]}.{drawn[1]}"),
    ),
    max_leaves=5,
)
_blocks = st.recursive(
    st.one_of(
        _expressions.map("{{{{ {} }}}}".format),
        _expressions.map("{{% set x = {} %}}".format),
        st.sampled_from(
            [
                "text ",
                "\n",
                "{{",
                "%}",
                "{#",
                "#}",
                "{% raw %}",
                "{% endraw %}",
                "{%- break %}",
                "{% include 'a' %}",
            ]
        ),
        st.sampled_from(
            [
                "{% import 'a' as b %}",
                "{% extends 'a' %}",
                "{% endfor %}",
                "{% else %}",
                "{% continue %}",
                "\0",
            ]
        ),
        any_text,
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map("".join),
        st.tuples(_expressions, inner).map(
            lambda drawn: "{{% for message in {} %}}{}{{% endfor %}}".format(*drawn)
        ),
        st.tuples(_expressions, inner, inner).map(
            lambda drawn: "{{% if {} %}}{}{{% else %}}{}{{% endif %}}".format(*drawn)
        ),
        inner.map("{{% for message in messages %}}{}{{% endfor %}}".format),
        inner.map("{{% macro f(x) %}}{}{{% endmacro %}}{{{{ f(f) }}}}".format),
        inner.map("{{% generation %}}{}{{% endgeneration %}}".format),
        inner.map("{{% filter upper %}}{}{{% endfilter %}}".format),
        inner.map("{{% call(x) f() %}}{}{{% endcall %}}".format),
    ),
    max_leaves=8,
)
_changed = spoilt(st.sampled_from(TEMPLATES).map(str.encode)).map(
    lambda content: content.decode(errors="replace")
)
templates = st.tuples(st.one_of(_blocks, _changed, _changed), conversations)

RUN_FILES = (
    "metrics.jsonl",
    "prompt.json",
    "ledger.json",
    "env.json",
    "rows.json",
    "samples.json",
    "proof.json",
)
RUN_FILES += ("check.json", "config.yaml", "adapter/manifest.json")
# A file of a run, and what is put in place of one of its values, of one of its lines or of its bytes.
changes = st.tuples(
    st.sampled_from(RUN_FILES) | st.sampled_from(RUN_FILES[:3]),
    st.sampled_from(("value", "value", "value", "whole", "bytes")),
    st.lists(st.integers(0, 50), min_size=1, max_size=6),
    json_values | st.sampled_from([1e308, -1, 10**20, True, "x" * 300]),
    st.binary(max_size=8),
)


def replaced(value: Any, path: Sequence[int], new: Any) -> Any:
    """`value` with the item that `path` leads to replaced by `new`; a path may end before a leaf."""
    if not path or not isinstance(value, dict | list) or not value:
        return new
    changed: Any = value.copy()
    key = list(value)[path[0] % len(value)] if isinstance(value, dict) else path[0] % len(value)
    changed[key] = replaced(value[key], path[1:], new)
    return changed
