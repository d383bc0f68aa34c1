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
from lorafit.data.json_rows import SeveralValuesError, json_rows
from lorafit.errors import DataError

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)

any_text = st.text('[]{}",:\\ \n1e-.truefalsn', max_size=30) | st.text('[]{}", \n1', max_size=12)


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
        return "rows", list(json_rows(source, "x"))
    except DataError as error:
        return error.problems[0].message, error.problems[0].place
    except SeveralValuesError:
        return ("several values",)


def expected(text: str) -> tuple[Any, ...]:
    """What json makes of the whole text."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if (
            error.msg == "Extra data"
            and "\n" in text[: error.pos]
            and not text.lstrip(" \t\n\r").startswith("[")
        ):
            return ("several values",)
        return f"is not JSON: {error.msg}", f"x line {error.lineno} column {error.colno}"
    if isinstance(value, dict):
        found = [item for item in value.values() if isinstance(item, list)]
        value = found[0] if len(found) == 1 else None
    return ("rows", value) if isinstance(value, list) else ("is not a list of rows", "x")


@given(rows=st.lists(json_values, max_size=5), indent=st.sampled_from([None, 1]), size=st.integers(1, 40))
def test_rows_of_any_array_cut_anywhere(rows: list[Any], indent: int | None, size: int) -> None:
    text = json.dumps(rows, indent=indent, ensure_ascii=False)
    assert outcome(text, size) == ("rows", rows)


@pytest.mark.parametrize("max_object", [1 << 24, 0], ids=["whole", "streamed"])
@given(before=json_values, rows=st.lists(json_values, max_size=3), size=st.integers(1, 40))
def test_rows_of_an_object_with_one_list(max_object: int, before: Any, rows: list[Any], size: int) -> None:
    value = {"a": {"b": before}, "data": rows, "c": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_OBJECT", max_object)
        assert outcome(json.dumps(value, indent=1), size) == ("rows", rows)
        assert outcome(json.dumps({**value, "more": []}), size)[0] == "is not a list of rows"
        assert outcome(json.dumps({"a": 1}), size)[0] == "is not a list of rows"


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="json words a trailing comma differently there")
@given(text=any_text, size=st.integers(1, 40))
@example('[{"a": 1},\n {"b" 2}]', 3)
@example('["a\nb"]', 2)
@example('{"a": [1]}\n{"a": [2]}', 1)
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
