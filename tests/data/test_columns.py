"""Tables of other names: read by `data.columns` or by the names that data sets use, or refused with what to write."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lorafit.data.columns import FIELDS, Columns, find_layout, is_row, mapped
from lorafit.data.formats import Chat, Content, parse
from lorafit.errors import DataError

Q, A, C, S = "the question", "the answer", "the context", "the system prompt"


def read(rows: list[Any], columns: Columns | None = None, format: str = "auto") -> list[Content]:  # noqa: A002
    """The content of `rows` as sources reads them."""
    layout = find_layout(rows, format, columns)
    values = [mapped(row, layout.columns) for row in rows]
    return [row.content for row in parse(values, layout.format, ["x"] * len(rows))]


def texts(row: Any, columns: Columns | None = None) -> dict[str, str]:
    return {name: text for name, text in read([row], columns)[0].fields().items() if text}


def refusal(row: Any, columns: Columns | None = None) -> tuple[str, str]:
    with pytest.raises(DataError) as caught:
        find_layout([row], "auto", columns)
    [problem] = caught.value.problems
    return problem.message, problem.hint


QA = {"instruction": Q, "output": A}


@pytest.mark.parametrize(
    ("row", "expected", "name"),
    [
        ({"instruction": Q, "context": C, "response": A, "category": "x"}, {**QA, "input": C}, "Dolly"),
        ({"question": Q, "answer": A}, QA, "GSM8K"),
        ({"query": Q, "response": A, "type": "x"}, QA, "MetaMath"),
        ({"id": "1", "system_prompt": S, "question": Q, "response": A}, {**QA, "system": S}, "OpenOrca"),
        ({"question": Q, "context": C, "answers": {"text": [A], "answer_start": [1]}}, {**QA, "input": C}, "SQuAD"),
        ({"document": Q, "summary": A, "id": "1"}, QA, "XSum"),
        ({"article": Q, "highlights": A}, QA, ""),
        ({"dialogue": Q, "summary": A}, QA, ""),
        ({"input": Q, "output": A}, QA, ""),
        ({"prompt": Q, "response": A}, QA, ""),
        ({"problem": Q, "solution": A, "level": 3}, QA, ""),
        ({"Question": Q, "Answer": A}, QA, ""),
        ({"inputs": Q, "targets": A}, QA, ""),
        ({"question": Q, "answer": [A, "another"]}, QA, ""),
        ({"question": Q, "answer": {"value": A, "aliases": ["x"]}}, QA, ""),
        ({"human": Q, "assistant": A}, QA, ""),
        ({"instruction": Q, "context": C, "output": A}, {**QA, "input": C}, ""),
        ({"instruction": Q, "input": C, "output": A, "text": "x", "prompt": "y"}, {**QA, "input": C}, ""),
        ({"instruction": Q, "output": A, "system_prompt": S}, {**QA, "system": S}, ""),
        ({"prompt": Q, "completion": A}, {"prompt": Q, "completion": A}, ""),
        ({"text": Q, "label": 1}, {"text": Q}, ""),
    ],
)  # fmt: skip
def test_layouts_that_data_sets_use(row: dict[str, Any], expected: dict[str, str], name: str) -> None:
    assert texts(row) == expected
    assert find_layout([row]).reason.startswith(f"{name} layout: " if name else "")
    assert is_row(row)


@pytest.mark.parametrize(
    "row",
    [
        {"conversation": [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]},
        {"conversations": ["a", "b", "c", "d"]},
        {"dialogue": ["a", "b", "c", "d"]},
        {"messages": [{"user": "a", "assistant": "b"}, {"user": "c", "assistant": "d"}]},
        {"turns": [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]},
    ],
)
def test_conversations_of_texts_and_of_pairs(row: dict[str, Any]) -> None:
    [content] = read([row])
    assert isinstance(content, Chat)
    assert [(turn.role, turn.content) for turn in content.messages] == [
        ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]  # fmt: skip


TURNS = [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": Q, "input": C, "output": A},
        {"prompt": Q, "completion": A},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"text": Q},
        {"messages": TURNS},
        {"turns": [Q, A]},
        {"conversation": [{"input": Q, "output": A}]},
        {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]},
    ],
)
@given(data=st.data())
def test_the_case_of_names_does_not_matter(row: dict[str, Any], data: st.DataObject) -> None:
    cases = st.sampled_from([str.upper, str.title, str.lower, " {} ".format])
    written = {data.draw(cases)(name): value for name, value in row.items()}
    assert read([written]) == read([row])


def test_names_in_capitals_that_fit_no_format_are_refused_under_their_own_names() -> None:
    message, hint = refusal({"Prompt": Q, "Chosen": A, "Rejected": "x"})
    assert message == "no format fits: the rows have `Chosen`, `Prompt`, `Rejected`"
    assert "data.columns=" in hint
    assert refusal({"Input": Q, "Label": 1})[0] == "no format fits: the rows have `Input`, `Label`"
    bad = {"Prompt": Q, "Completion": A, "Label": False}  # a bad answer is not trained in silence
    assert refusal(bad)[0].startswith("no format fits")


HINTED = re.compile(r"data\.columns='(\{.*?\})'")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"problem": Q, "solution": A, "answer": A}, "several ways: `problem`, `answer`, `solution`"),
        ({"question": Q, "query": Q, "response": A}, "several ways"),
        (
            {"question": Q, "choices": ["a", "b"], "answer": 1},
            "several ways: `question`, `choices`, `answer`",
        ),
        ({"question": Q, "passage": C, "document": C, "answer": A}, "several ways"),
        ({"text": Q, "summary": A}, "several ways: `text`, `summary`"),
        ({"prompt": Q, "chosen": A, "rejected": "x"}, "`chosen` and `rejected`"),
        ({"chosen": A, "rejected": "x"}, "`chosen` and `rejected`"),
        (
            {
                "chosen": [{"role": "user", "content": Q}, {"role": "assistant", "content": A}],
                "rejected": [{"role": "user", "content": Q}],
            },
            "`chosen` and `rejected`",
        ),
    ],
)
def test_what_can_be_read_in_several_ways_is_refused_with_columns_that_work(
    row: dict[str, Any], message: str
) -> None:
    said, hint = refusal(row)
    assert message in said
    match = HINTED.search(hint)
    assert match is not None
    assert {A, "1"} & set(texts(row, yaml.safe_load(match[1])).values())
    assert is_row(row) == ("chosen" in row)


def test_answers_that_are_marked_as_bad_are_not_trained_in_silence() -> None:
    row = {"prompt": Q, "completion": A, "label": False}
    assert "the bad answers would be trained too" in refusal(row)[0]
    assert len(read([row], format="completion")) == 1


def test_rows_that_fit_nothing_are_told_what_to_write() -> None:
    message, hint = refusal({"question": Q, "expected_answer": A})
    assert message == "no format fits: the rows have `expected_answer`, `question`"
    assert "data.columns='{instruction: question, output: COLUMN}'" in hint
    assert "each row is one turn" in refusal({"role": "user", "content": Q})[0]
    assert refusal("text")[0].startswith("no format fits")


def test_columns_that_are_given() -> None:
    row = {"q": {"text": [Q]}, "a": A, "c.d": C, "output": "unused", "x": 1}
    columns = {"instruction": "q.text.0", "output": "a", "input": "c.d"}
    assert texts(row, columns) == {**QA, "input": C}
    assert mapped(row, columns) == {**QA, "input": C, "column output": "unused", "x": 1}
    assert texts({"t": Q}, {"text": "t"}) == {"text": Q}
    assert texts({"p": Q, "c": A}, {"prompt": "p", "completion": "c"}) == {"prompt": Q, "completion": A}
    assert isinstance(read([{"d": ["a", "b"]}], {"messages": "d"})[0], Chat)
    assert find_layout([row], "auto", columns).reason == (
        "data.columns: instruction is `q.text.0`, output is `a`, input is `c.d`"
    )
    assert "has no field `instrution`" in refusal(row, {"instrution": "q"})[0]
    assert refusal(row, {"instruction": "question"}) == (
        "no row has the column `question` of data.columns", "the rows have `q`, `a`, `c.d`, `output`, `x`")  # fmt: skip
    # a field of the row that is given keeps the others out
    assert texts({"messages": "x", "q": Q, "a": A}, {"instruction": "q", "output": "a"}) == QA


def test_numbers_are_read_as_their_text_and_nan_is_missing() -> None:
    row = {"instruction": Q, "input": float("nan"), "output": 42}
    assert texts(row) == {"instruction": Q, "output": "42"}
    assert texts({"question": 7, "answer": 3.5}) == {"instruction": "7", "output": "3.5"}
    assert mapped({"text": 10**30, "weight": 0.5}, {}) == {"text": str(10**30), "weight": 0.5}
    for value in (True, float("inf")):
        with pytest.raises(DataError, match="not text"):
            texts({"question": Q, "answer": value})


def test_a_conversation_as_json_text_in_a_table() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    [content] = read([{"messages": json.dumps(turns), "id": "1"}])
    assert isinstance(content, Chat)
    assert len(content.messages) == 2
    [content] = read([{"dialog": json.dumps(["a", "b"])}], {"messages": "dialog"})
    assert isinstance(content, Chat)
    for text in ("[nothing", "{}", "a"):
        with pytest.raises(DataError, match="is text, not a list"):
            read([{"messages": text}])


names = st.text("abc xyz._", min_size=1, max_size=4).filter(lambda name: name.strip("0123456789"))


@given(data=st.data(), fields=st.sampled_from([("instruction", "output"), ("instruction", "input", "output", "system"),
       ("prompt", "completion"), ("text",)]))  # fmt: skip
def test_any_renaming_is_undone(data: st.DataObject, fields: tuple[str, ...]) -> None:
    row = {field: data.draw(st.text("some words", min_size=1).filter(str.strip)) for field in fields}
    count = len(fields)
    renamed = data.draw(st.lists(names, min_size=count, max_size=count, unique=True))
    extra = data.draw(
        st.dictionaries(names.filter(lambda name: name not in renamed), st.integers(), max_size=3)
    )
    table = {**dict(zip(renamed, row.values(), strict=True)), **extra}
    columns = dict(zip(fields, renamed, strict=True))
    assert texts(table, columns) == row
    kept = mapped(table, columns)
    assert isinstance(kept, dict)
    assert len(kept) == len(table)  # every column is there, so that unused ones are counted


keys = st.sampled_from(
    [*FIELDS, "question", "answer", "answers", "chosen", "rejected", "label", "context", "choices"]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(0, 3) | st.floats() | st.text("ab", max_size=2),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(keys | st.just("role"), inner, max_size=2),
    max_leaves=6,
)


@given(
    rows=st.lists(st.dictionaries(keys, values, max_size=4) | values, max_size=4),
    columns=st.dictionaries(keys, keys, max_size=2),
)
def test_any_rows_are_read_or_refused(rows: list[Any], columns: dict[str, str]) -> None:
    try:
        read(rows, columns)
    except DataError as error:
        assert all(problem.message for problem in error.problems)
