"""JSON of any size: rows and faults are those of json itself, however the text is cut into blocks."""

from __future__ import annotations

import io
import json
import sys
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lorafit.data import json_rows as module
from lorafit.data.json_rows import has_row_lines, json_rows
from lorafit.errors import DataError

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)

any_text = st.builds(
    "[{}".format,
    st.text('[]{}",:\\ \n1e-.truefalsn', max_size=30) | st.text('[]{}", \n1', max_size=12),
)


class Blocks(io.StringIO):
    """Gives at most `size` characters at a time."""

    size = 1

    def read(self, count: int | None = -1) -> str:
        return super().read(self.size)


def outcome(text: str, size: int) -> tuple[Any, ...]:
    """What comes of `text`: rows, or the fault with its place."""
    source = Blocks(text)
    source.size = size
    try:
        return "rows", [value for _, value in json_rows(source, "x")]
    except DataError as error:
        return error.problems[0].message, error.problems[0].place


def expected(text: str) -> tuple[Any, ...]:
    """What json makes of the whole text that begins with an array."""
    try:
        return "rows", json.loads(text)
    except json.JSONDecodeError as error:
        return f"is not JSON: {error.msg}", f"x line {error.lineno} column {error.colno}"


@given(rows=st.lists(json_values, max_size=5), indent=st.sampled_from([None, 1]), size=st.integers(1, 40))
def test_rows_of_any_array_cut_anywhere(rows: list[Any], indent: int | None, size: int) -> None:
    text = json.dumps(rows, indent=indent, ensure_ascii=False)
    assert outcome(text, size) == ("rows", rows)


@pytest.mark.parametrize("max_object", [1 << 24, 0], ids=["whole", "streamed"])
@given(
    before=st.text(max_size=3),
    rows=st.lists(st.dictionaries(st.sampled_from("xyz"), json_values), min_size=1, max_size=3),
    size=st.integers(1, 40),
)
def test_rows_of_an_object_with_one_list(max_object: int, before: str, rows: list[Any], size: int) -> None:
    value = {"a": {"b": before}, "data": rows, "c": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_OBJECT", max_object)
        assert outcome(json.dumps(value, indent=1), size) == ("rows", rows)
        assert outcome(json.dumps({**value, "more": [{}]}), size)[0].startswith("is not a list of rows")


@given(
    rows=st.lists(st.dictionaries(st.text(max_size=3), json_values, max_size=3), min_size=2, max_size=4),
    indent=st.sampled_from([None, 2]),
    between=st.sampled_from(["\n", ",\n", "\n\n", " "]),
    size=st.integers(1, 40),
)
def test_objects_one_after_the_other(rows: list[Any], indent: int | None, between: str, size: int) -> None:
    text = between.join(json.dumps(row, indent=indent) for row in rows)
    assert outcome(text, size) == ("rows", rows)
    source = Blocks(text)
    source.size = size
    for (line, _), row in zip(json_rows(source, "x"), rows, strict=True):
        assert "{" in text.split("\n")[line - 1]
        assert row in rows


FLAT = st.fixed_dictionaries({"instruction": st.text(max_size=3), "output": st.text(max_size=3)})


@given(rows=st.lists(FLAT, min_size=1, max_size=4), size=st.integers(1, 40))
def test_the_layouts_of_pandas_and_datasets(rows: list[dict[str, str]], size: int) -> None:
    by_column = {key: [row[key] for row in rows] for key in rows[0]}
    for layout in (
        by_column,
        {key: {str(n): value for n, value in enumerate(values)} for key, values in by_column.items()},
        {str(n): row for n, row in enumerate(rows)},
        {
            "columns": list(by_column),
            "index": [1] * len(rows),
            "data": [[row[key] for key in by_column] for row in rows],
        },
        {"schema": {"fields": [{"name": "instruction"}]}, "data": rows},
    ):
        assert outcome(json.dumps(layout), size) == ("rows", rows)


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "a", "output": "b", "tags": [], "more": [{"text": "c"}]},
        {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "tools": [1, 2],
        },
        {"conversation": [{"input": "a", "output": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}]},
        {"text": "a"},
        {"name": "no row, but nothing else either", "keywords": ["a", "b"]},
    ],
)
def test_a_single_object_is_one_row(row: dict[str, Any]) -> None:
    assert outcome(json.dumps(row, indent=1), 5) == ("rows", [row])


def test_a_list_of_conversations_is_not_one() -> None:
    rows = [{"conversations": [{"from": "human", "value": "a"}]}, {"conversations": []}]
    assert outcome(json.dumps({"conversations": rows}), 9) == ("rows", rows)


def test_missing_values_are_null_and_infinities_stay() -> None:
    rows = [{"a": None, "b": [None, float("inf"), -float("inf")]}]
    assert outcome('[{"a": NaN, "b": [NaN, Infinity, -Infinity]}]', 7) == ("rows", rows)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1}\n{"a": 2}\n', True),
        ('{"a": 1},\n{"a": 2},\n', True),
        ('{"a": \n{"a": 2}\n', True),  # the first line is broken
        ('\n\n{"a": 1}\n\n{"b"\n', True),
        ('{"a": 1}\n', False),
        ('{\n "a": 1\n}\n{\n "a": 2\n}\n', False),
        ('{\n "messages": [\n  {"role": "user"},\n  {"role": "assistant"}\n ]\n}\n', False),
        ('[\n{"a": 1},\n{"a": 2}\n]', False),
        ("", False),
    ],
)
def test_whether_each_line_is_a_row(text: str, expected: bool) -> None:
    assert has_row_lines(io.StringIO(text)) is expected


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="json words a trailing comma differently there")
@given(text=any_text, size=st.integers(1, 40))
@example('[{"a": 1},\n {"b" 2}]', 3)
@example('["a\nb"]', 2)
@example("[1, 2,]", 1)
@example("[1 2]", 1)
@example('[1, "\\u12', 1)
def test_faults_of_any_text_are_those_of_json(text: str, size: int) -> None:
    assert outcome(text, size) == expected(text)


@given(rows=st.lists(json_values, min_size=1, max_size=4), cut=st.integers(0, 200), size=st.integers(1, 40))
def test_a_cut_file_is_never_taken_for_a_whole_one(rows: list[Any], cut: int, size: int) -> None:
    text = json.dumps(rows)
    cut = min(cut, len(text) - 1)
    assert outcome(text[:cut], size) == expected(text[:cut])


def test_a_fault_early_in_a_long_file_is_found_at_once() -> None:
    source = Blocks('[{"a" 1}' + " " * 10_000 + "]")
    source.size = 100
    with pytest.raises(DataError, match="line 1 column 7"):
        list(json_rows(source, "x"))
    assert source.tell() <= 200
