"""Preferences: every layout of TRL and LLaMA-Factory is read, wrong rows are named, masks and marks are exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny_models import write_model

from lorafit.check.run import check_data
from lorafit.config.load import load_config
from lorafit.data.build import build_data
from lorafit.data.content import Chat, Completion, Instruction, Message, Preference
from lorafit.data.formats import parse
from lorafit.data.pair_marks import documents_of
from lorafit.errors import DataError
from lorafit.hub.client import model_folder


def read(raw: object) -> Preference:
    [row] = parse([raw], "preference", ["x.json row 1"])
    assert isinstance(row.content, Preference)
    assert not row.unused
    return row.content


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


ASKED, GOOD, BAD = turn("user", "Hi"), turn("assistant", "Ho"), turn("assistant", "No")
CHATS = Preference(
    Chat((Message("user", "Hi", weight=0.0), Message("assistant", "Ho"))),
    Chat((Message("user", "Hi", weight=0.0), Message("assistant", "No"))),
)


@pytest.mark.parametrize(
    ("raw", "content"),
    [
        (
            {"prompt": "a ", "chosen": "b", "rejected": "c"},
            Preference(Completion("a ", "b"), Completion("a ", "c")),
        ),
        (
            {"instruction": "a", "input": "i", "system": "s", "chosen": "b", "rejected": "c"},
            Preference(Instruction("a", "i", "b", "s"), Instruction("a", "i", "c", "s")),
        ),
        (
            {"question": "a", "chosen": "b", "rejected": "c"},
            Preference(Instruction("a", "", "b"), Instruction("a", "", "c")),
        ),
        ({"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]}, CHATS),
        ({"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, CHATS),
        ({"prompt": "Hi", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, CHATS),
        ({"prompt": "Hi", "chosen": [GOOD], "rejected": [BAD]}, CHATS),
        ({"messages": [ASKED], "chosen": "Ho", "rejected": "No"}, CHATS),
        (
            {
                "conversations": [{"from": "human", "value": "Hi"}],
                "chosen": {"from": "gpt", "value": "Ho"},
                "rejected": {"from": "gpt", "value": "No"},
            },
            CHATS,
        ),
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is black."},
            Preference(Completion("The sky is", " blue."), Completion("The sky is", " black.")),
        ),
        ({"chosen": [ASKED, GOOD], "rejected": [ASKED, GOOD]}, Preference(CHATS.chosen, CHATS.chosen)),
        ({"prompt": "a", "completion": "b", "label": True}, Preference(Completion("a", "b"), None)),
        ({"prompt": "a", "completion": "b", "label": False}, Preference(None, Completion("a", "b"))),
        ({"prompt": [ASKED], "completion": [GOOD], "label": True}, Preference(CHATS.chosen, None)),
        ({"messages": [ASKED, BAD], "label": False}, Preference(None, CHATS.rejected)),
    ],
)
def test_every_layout_is_read(raw: object, content: Preference) -> None:
    assert read(raw) == content


def test_the_key_of_llama_factory_is_an_alias() -> None:
    [row] = parse([{"instruction": "a", "output": "b", "kto_tag": True}], "preference", ["x"])
    assert row.content == Preference(Instruction("a", "", "b"), None)
    assert row.aliases == ("`kto_tag` as `label`",)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "`rejected` is missing"),
        ({"prompt": "a"}, "`chosen` is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "`rejected` is empty"),
        ({"chosen": "a", "rejected": [BAD]}, "`chosen` is text, but the other answer is turns"),
        ({"prompt": "Who?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, "`prompt` is not a turn of"),
        ({"prompt": "a", "completion": "b", "label": "good"}, "`label` is 'good', not true or false"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "weight": 0.5}, "`weight` is 0.5, but a preference"),
        ({"chosen": [ASKED, {**GOOD, "weight": 0.5}], "rejected": [ASKED, BAD]}, "a turn of weight 0.5"),
        ({"chosen": [ASKED], "rejected": [ASKED]}, "no assistant turn"),
    ],
)
def test_a_wrong_row_is_named(raw: object, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(raw)
    assert all(problem.hint for problem in caught.value.problems)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("preferences") / "model")


def built(folder: Path, model: Path, rows: list[dict[str, Any]], *words: str) -> Any:
    (folder / "pairs.json").write_text(json.dumps(rows))
    config = load_config(
        None, [f"model.name={model}", f"data.path={folder / 'pairs.json'}", "train.method=dpo", *words]
    )
    return config, build_data(config, model_folder(str(model)), None, quiet=True)


_TEXTS = st.text("ab c", min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=4)
@given(st.lists(st.tuples(_TEXTS, _TEXTS, _TEXTS), min_size=1, max_size=4), st.sampled_from(["", "chat"]))
def test_both_documents_of_a_pair_are_the_rows_of_its_answers(
    model: Path, tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[str, str, str]], kind: str
) -> None:
    """The ids and masks of each answer are those of SFT on that answer by itself."""
    folder = tmp_path_factory.mktemp("rows")
    names = ("instruction", "chosen", "rejected") if kind else ("prompt", "chosen", "rejected")
    rows = [dict(zip(names, row, strict=True)) for row in texts]
    words = ("data.holdout=0", *(["data.template=chat"] if kind else []))
    _, pairs = built(folder, model, rows, *words)
    for side, key in enumerate(("chosen", "rejected")):
        answer = "output" if kind else "completion"
        (folder / "sft.json").write_text(
            json.dumps([{names[0]: row[names[0]], answer: row[key]} for row in rows])
        )
        config = load_config(None, [f"model.name={model}", f"data.path={folder / 'sft.json'}", *words])
        alone = build_data(config, model_folder(str(model)), None, quiet=True)
        for index in range(len(rows)):
            ids, marks = pairs.training.to_pack.row(index)
            _, found, told = list(documents_of(ids, marks))[side]
            np.testing.assert_array_equal(found, alone.training.row(index)[0])
            np.testing.assert_array_equal(told > 0, alone.training.row(index)[1])


def test_a_pair_that_is_too_long_keeps_both_answers(tmp_path: Path, model: Path) -> None:
    rows = [
        {"prompt": "x" * 10, "chosen": "a" * 40, "rejected": "b" * 9},
        {"prompt": "y" * 60, "chosen": "a", "rejected": "b"},
    ]
    _, data = built(tmp_path, model, rows, "data.holdout=0", "data.max_length=30", "data.too_long=truncate")
    ((one, other),) = [
        list(documents_of(*data.training.to_pack.row(index))) for index in range(len(data.training))
    ]
    assert len(one[1]) == 30
    assert len(other[1]) < 30
    assert list(data.ledger.dropped) == ["nothing to train on in the first 30 tokens"]


def test_checks_find_what_teaches_nothing(tmp_path: Path, model: Path) -> None:
    rows = [{"prompt": f"Q{n}? ", "chosen": f"yes {n} " * 3, "rejected": f"no {n}"} for n in range(30)]
    rows[3]["rejected"] = rows[3]["chosen"]
    rows[5] = {"prompt": "Q4? ", "chosen": rows[4]["rejected"], "rejected": rows[4]["chosen"]}
    config, data = built(tmp_path, model, rows, "data.holdout=3")
    leaked = int(data.heldout.numbers[0])
    rows[next(int(number) for number in data.training.numbers if number > 5)] = {
        "prompt": rows[leaked]["prompt"],
        "chosen": "never",
        "rejected": "before",
    }
    config, data = built(tmp_path, model, rows, "data.holdout=3")
    found = {verdict.name: verdict for verdict in check_data(config, quiet=True).verdicts}
    assert found["equal answers"].rows == (4,)
    assert found["contradictions"].rows == (6,)
    assert found["held-out prompts"].verdict == "warn"
    assert leaked + 1 in found["held-out prompts"].rows
    assert found["length of winners"].verdict == "warn"
    assert found["trained text"].verdict == "pass"
    assert found["stop token"].verdict == "pass"
