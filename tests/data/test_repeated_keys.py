"""A key that a JSON object has twice is a fault of its row: the first value never disappears in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.data.content import Call
from lorafit.data.json_rows import MAX_OBJECT
from lorafit.data.readers import read_file
from lorafit.data.sources import Reading, find_sources
from lorafit.errors import DataError, Problem

GOOD = {"instruction": "Say 3.", "input": "", "output": "Three."}
TWICE = '{"instruction": "Say 4.", "input": "", "output": "x", "output": "Four."}'
NESTED = (
    '{"messages": [{"role": "user", "content": "a", "content": "b"}, {"role": "assistant", "content": "c"}]}'
)

scalars = st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
)


def text_of(value: object, twice: bool) -> str:
    """JSON text of `value`; with `twice` the first object that is not empty repeats its last key."""

    def write(value: object) -> str:
        nonlocal twice
        if isinstance(value, dict):
            repeats, twice = twice and bool(value), twice and not value
            parts = [f"{json.dumps(key)}: {write(item)}" for key, item in value.items()]
            return "{" + ", ".join(parts + parts[-1:] * repeats) + "}"
        if isinstance(value, list):
            return "[" + ", ".join(map(write, value)) + "]"
        return json.dumps(value)

    return write(value)


@given(st.lists(st.tuples(values, st.booleans()), min_size=2, max_size=4), st.booleans())
def test_any_object_with_a_key_twice_is_the_fault_of_its_row(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[object, bool]], lines: bool
) -> None:
    objects = [({"row": value}, twice) for value, twice in rows]
    texts = [text_of(value, twice) for value, twice in objects]
    file = tmp_path_factory.getbasetemp() / ("rows.jsonl" if lines else "rows.json")
    file.write_text("\n".join(texts) if lines else f"[{', '.join(texts)}]")
    found = [row.value for row in read_file(file, "rows")]
    assert len(found) == len(objects)
    for row, (value, twice) in zip(found, objects, strict=True):
        if twice:
            assert isinstance(row, Problem)
            assert "is there twice" in row.message
        else:
            assert row == value


LAYOUTS = {
    "lines": ("rows.jsonl", "{good}\n{bad}\n{good}\n"),
    "first line": ("rows.jsonl", "{bad}\n{good}\n{good}\n"),
    "array": ("rows.json", "[{good},{bad},\n{good}]"),
    "objects": ("rows.json", "{good}\n\n{bad}\n\n{good}"),
    "lines in .json": ("rows.json", "{good}\n{bad}\n{good}\n"),
    "list under a key": ("rows.json", '{{"data": [{good}, {bad}, {good}]}}'),
    "long list under a key": ("rows.json", '{{"pad": "{pad}", "data": [{good}, {bad}, {good}]}}'),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bad", [TWICE, NESTED.replace("messages", "input")])
def test_such_rows_are_refused_by_row_or_left_out_and_counted(layout: str, bad: str, tmp_path: Path) -> None:
    name, text = LAYOUTS[layout]
    pad = "x" * MAX_OBJECT if layout.startswith("long") else ""
    file = tmp_path / name
    file.write_text(text.format(good=json.dumps(GOOD), bad=bad, pad=pad))
    number = 1 if layout == "first line" else 2
    with pytest.raises(DataError) as caught:
        list(find_sources([str(file)]).reader().chunks())
    (problem,) = caught.value.problems
    key = "output" if bad == TWICE else "content"
    assert problem.message == f"the key `{key}` is there twice"
    assert f"row {number}" in problem.place
    assert problem.hint == "keep one of the two; data.bad_rows=drop leaves such rows out"
    reader = find_sources([str(file)], Reading(drops=True)).reader()
    assert sum(len(chunk.rows) for chunk in reader.chunks()) == 2
    assert {why: list(rows) for why, rows in reader.dropped.items()} == {problem.message: [number - 1]}


@pytest.mark.parametrize(
    "text",
    [
        TWICE,
        '{"data": [], "data": [' + json.dumps(GOOD) + "]}",
        '{"instruction": {"0": "a", "0": "b"}, "output": {"0": "c"}}',
        '{"a": 1, "a": 2, "pad": "' + "x" * MAX_OBJECT + '", "data": [' + json.dumps(GOOD) + "]}",
    ],
)
def test_a_file_of_one_object_with_a_key_twice_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(text)
    with pytest.raises(DataError) as caught:
        list(find_sources([str(file)]).reader().chunks())
    assert "is there twice" in str(caught.value)


def test_json_texts_within_a_row_by_the_same_rule(tmp_path: Path) -> None:
    turns = '[{"role": "user", "content": "a", "content": "b"}, {"role": "assistant", "content": "c"}]'
    file = tmp_path / "rows.csv"
    quoted = turns.replace('"', '""')
    file.write_text(f'messages\n"{quoted}"\n')
    with pytest.raises(DataError) as caught:
        list(find_sources([str(file)]).reader().chunks())
    assert "`messages` is JSON text with a key twice, not a list" in str(caught.value)
    assert not Call("f", '{"a": 1, "a": 2}').is_valid


@pytest.mark.parametrize("kind", ["parquet", "arrow", "nested"])
def test_columns_of_one_name_are_refused(kind: str, tmp_path: Path) -> None:
    texts = pyarrow.array(["a"])
    twice = pyarrow.StructArray.from_arrays([texts, texts], names=["k", "k"])
    table = pyarrow.table([texts, texts], names=["text", "text"])
    if kind == "nested":
        table = pyarrow.table([texts, twice], names=["text", "more"])
    file = tmp_path / ("rows.parquet" if kind == "parquet" else "rows.arrow")
    if kind == "parquet":
        pyarrow.parquet.write_table(table, file)
    else:
        with pyarrow.ipc.new_file(str(file), table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(DataError) as caught:
        list(find_sources([str(file)]).reader().chunks())
    assert ("columns have the same name" if kind != "nested" else "duplicate field names") in str(
        caught.value
    )
