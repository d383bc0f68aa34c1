"""Formats: what is detected and why, and that every wrong row names its place, its field and the fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny_models import write_model

from lorafit.check.run import check_data
from lorafit.config.load import load_config
from lorafit.config.schema import DataSection
from lorafit.data.build import build_data
from lorafit.data.formats import (
    FORMATS,
    Chat,
    Completion,
    Content,
    Detected,
    Fields,
    Format,
    Instruction,
    Message,
    Text,
    detect,
    parse,
)
from lorafit.errors import DataError, Problem
from lorafit.hub.client import model_folder

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}
CHAT = Chat((Message("user", "Hi"), Message("assistant", "Ho")))


def one(format_name: str, raw: object) -> Content:
    [row] = parse([raw], format_name, ["x.json row 1"], start=5)
    assert (row.number, row.place) == (5, "x.json row 1")
    return row.content


@pytest.mark.parametrize(
    ("format_name", "raw", "content"),
    [
        ("alpaca", {"instruction": "a", "output": "b"}, Instruction("a", "", "b")),
        ("alpaca", {"instruction": "a", "input": None, "output": "b"}, Instruction("a", "", "b")),
        ("alpaca", {"instruction": "a", "input": "", "output": ""}, Instruction("a", "", "")),
        (
            "alpaca",
            {"instruction": "a", "input": "c", "output": "b", "system": "s", "id": 3},
            Instruction("a", "c", "b", "s"),
        ),
        ("messages", {"messages": [USER, ANSWER]}, CHAT),
        (
            "messages",
            {
                "messages": [
                    USER,
                    {
                        "role": "assistant",
                        "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "o"}],
                    },
                ]
            },
            CHAT,
        ),
        ("messages", {"messages": [USER, {**ANSWER, "tool_calls": None}]}, CHAT),
        ("sharegpt", {"conversations": [HUMAN, GPT]}, CHAT),
        ("sharegpt", {"conversation": [{**HUMAN, "from": "user"}, {**GPT, "from": "bing"}]}, CHAT),
        (
            "sharegpt",
            {"conversations": [HUMAN, GPT], "system": "s"},
            Chat((Message("system", "s"), *CHAT.messages)),
        ),
        ("completion", {"prompt": "", "completion": "b"}, Completion("", "b")),
        ("text", {"text": "a"}, Text("a")),
    ],
)
def test_rows_of_each_format(format_name: str, raw: object, content: Content) -> None:
    assert one(format_name, raw) == content


WRONG: list[tuple[str, Any, str, str]] = [
    ("alpaca", {"instruction": "a"}, "`output` is missing", "field `output`"),
    ("alpaca", {"instruction": "a", "output": None}, "`output` is null", "field `output`"),
    ("alpaca", {"instruction": "a", "output": 42}, "`output` is a number, not text", "field `output`"),
    ("alpaca", {"instruction": " ", "output": "b"}, "`instruction` is empty", "field `instruction`"),
    (
        "alpaca",
        {"instruction": "a", "input": ["c"], "output": "b"},
        "`input` is a list, not text",
        "field `input`",
    ),
    (
        "alpaca",
        {"instruction": "a\ud800", "output": "b"},
        "a lone surrogate U+D800 at position 1",
        "`instruction`",
    ),
    ("alpaca", {"instruction": "a", "output": "b\0"}, "a NUL character at position 1", "field `output`"),
    ("alpaca", ["a", "b"], "the row is a list, not an object", "x.json row 1"),
    ("messages", {"messages": []}, "`messages` is empty", "field `messages`"),
    ("messages", {"messages": None}, "`messages` is null, not a list", "field `messages`"),
    ("messages", {}, "`messages` is missing", "field `messages`"),
    ("messages", {"messages": ["Hi"]}, "`messages` holds text", "field `messages`"),
    ("messages", {"messages": [USER]}, "has no assistant turn", "field `messages`"),
    ("messages", {"messages": [USER, ANSWER, USER]}, "ends in a user turn", "field `messages`"),
    (
        "messages",
        {"messages": [{**USER, "role": "system"}, {**USER, "role": "system"}, ANSWER]},
        "two system",
        "",
    ),
    (
        "messages",
        {"messages": [USER, {**USER, "role": "system"}, ANSWER]},
        "after the start",
        "field `messages`",
    ),
    (
        "messages",
        {"messages": [{"role": "critic", "content": "Hi"}, ANSWER]},
        "'critic', which is no",
        "messages[0], field",
    ),
    ("messages", {"messages": [{"content": "Hi"}, ANSWER]}, "`role` is missing", "messages[0], field `role`"),
    (
        "messages",
        {"messages": [{"role": "user"}, ANSWER]},
        "`content` is missing",
        "messages[0], field `content`",
    ),
    (
        "messages",
        {"messages": [USER, {**ANSWER, "content": ""}]},
        "is empty: nothing to train on",
        "messages[1]",
    ),
    ("messages", {"messages": [USER, {**ANSWER, "content": None}]}, "`content` is null", "messages[1]"),
    (
        "messages",
        {"messages": [USER, {**ANSWER, "tool_calls": [{}]}]},
        "has a call without a name",
        "[1], field `tool_calls`",
    ),
    (
        "messages",
        {"messages": [{**USER, "content": [{"type": "image_url"}]}, ANSWER]},
        "'image_url'; only text",
        "",
    ),
    ("messages", {"messages": [{**USER, "content": [3]}, ANSWER]}, "type a number; only text", "content[0]"),
    ("sharegpt", {"conversations": [HUMAN]}, "has no assistant turn", "field `conversations`"),
    ("sharegpt", {"conversations": [{**HUMAN, "from": "dog"}, GPT]}, "'dog', which is no known role", "[0]"),
    ("sharegpt", {"conversations": [HUMAN, {"from": "gpt", "value": 3}]}, "`value` is a number", "[1]"),
    ("completion", {"prompt": "a", "completion": ""}, "`completion` is empty", "field `completion`"),
    ("completion", {"prompt": True, "completion": "b"}, "`prompt` is true or false", "field `prompt`"),
    ("text", {"text": "\n"}, "`text` is empty", "field `text`"),
    ("text", {"text": {}}, "`text` is an object", "field `text`"),
]


@pytest.mark.parametrize(("format_name", "raw", "message", "field"), WRONG)
def test_each_wrong_row_names_place_field_and_fix(
    format_name: str, raw: object, message: str, field: str
) -> None:
    with pytest.raises(DataError) as caught:
        one(format_name, raw)
    [problem] = caught.value.problems
    assert message in problem.message
    assert problem.place.startswith("x.json row 1")
    assert field in problem.place
    assert problem.hint


def test_all_problems_of_all_rows_at_once() -> None:
    rows = [
        {"instruction": 1},
        {"instruction": "a", "output": "b"},
        None,
        {"instruction": "a", "output": "b\0"},
    ]
    with pytest.raises(DataError) as caught:
        parse(rows, "alpaca", [f"x.json row {number}" for number in (1, 2, 3, 4)])
    places = [problem.place for problem in caught.value.problems]
    assert [place.partition(",")[0] for place in places] == [
        f"x.json row {number}" for number in (1, 1, 3, 4)
    ]


_keys = st.sampled_from(["messages", "conversations", "role", "content", "from", "value", "text", "type",
                         "instruction", "input", "output", "prompt", "completion", "tool_calls"])  # fmt: skip
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("format_name", FORMATS)
@given(raw=json_values)
def test_any_row_is_parsed_or_reported(format_name: str, raw: object) -> None:
    problems: tuple[Problem, ...] = ()
    try:
        one(format_name, raw)
    except DataError as error:
        problems = error.problems
    assert all(problem.place.startswith("x.json row 1") and problem.hint for problem in problems)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"instruction": "", "output": "", "text": ""},
            Detected("alpaca", "every row has `instruction` and `output`"),
        ),
        ({"messages": [], "prompt": ""}, Detected("messages", "every row has `messages`")),
        ({"conversation": []}, Detected("sharegpt", "every row has `conversation`")),
        ({"prompt": "", "completion": ""}, Detected("completion", "every row has `prompt` and `completion`")),
        ({"text": ""}, Detected("text", "every row has `text`")),
    ],
)
def test_detection_says_why(row: object, expected: Detected) -> None:
    assert detect([row, row]) == expected


def test_detection_leaves_single_wrong_rows_to_parse() -> None:
    rows: list[object] = [{"text": "a"}, {"text": "a"}, {"tetx": "a"}]
    assert detect(rows) == Detected("text", "2 of the first 3 rows have `text`")


def test_a_dataset_that_nothing_fits() -> None:
    for rows in ([{"question": "a", "answer": "b"}], [1, 2], []):
        with pytest.raises(DataError, match="no format fits") as caught:
            detect(rows)
        [problem] = caught.value.problems
        assert all(name in problem.hint for name in FORMATS)
        assert not rows or rows[0] == 1 or "`answer`, `question`" in problem.message


@pytest.mark.shared
def test_the_seed_tasks_fit_no_format(shared: Any) -> None:
    lines = (shared / "data/self_instruct_seed_tasks.jsonl").read_text().splitlines()
    with pytest.raises(DataError, match="`instances`"):
        detect([json.loads(line) for line in lines])


def test_the_schema_has_the_names_of_the_registry() -> None:
    field = DataSection.model_fields["format"]
    assert get_args(field.annotation) == ("auto", *FORMATS)


def test_a_registered_format_is_all_that_detection_training_and_checks_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(row: Fields) -> Content:
        return Completion(row.required("clue"), row.filled("solution"))

    monkeypatch.setitem(FORMATS, "riddle", Format((("clue",), ("solution",)), Completion, read))
    model = write_model(tmp_path / "model")
    rows = [{"clue": f"What is number {n}? ", "solution": f"It is {n}."} for n in range(20)]
    rows[4]["solution"] = "N/A"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = [f"model.name={model}", f"data.path={tmp_path / 'rows.json'}", "run.samples=1", "data.holdout=2"]
    config = load_config(None, words)
    training_data = build_data(config, model_folder(str(model)), None, quiet=True)
    assert (training_data.format, training_data.reason) == ("riddle", "every row has `clue` and `solution`")
    assert training_data.samples[0].content == read(Fields(rows[training_data.samples[0].number], "", []))
    ids, trained = training_data.encoded.row(7)
    decoded = training_data.tokenizer.decode(ids[trained].tolist())
    assert decoded.strip().removesuffix("</s>") == "It is 7."
    results = {result.name: result for result in check_data(config, quiet=True).verdicts}
    assert results["answers"].rows == (5,)
    assert results["trained text"].verdict == "pass"
    del rows[3]["solution"]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"`solution` is missing"):
        build_data(config, model_folder(str(model)), None, quiet=True)
