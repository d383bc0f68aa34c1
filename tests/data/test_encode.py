"""Encoding: the flat arrays hold the rendered rows, fitted to the contract; nothing is lost silently."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.toy_tokenizers import hostile_text, llama_like, load

from lorafit.data import encode
from lorafit.data.encode import encode_rows
from lorafit.data.formats import Chat, Content, Instruction, Message, Row, Text
from lorafit.data.ledger import Ledger
from lorafit.data.template import Rendered, Renderer, contract
from lorafit.data.tokenizer import Tokenizer
from lorafit.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(llama_like(tmp_path_factory.mktemp("toy")))


def make(tokenizer: Tokenizer, **changes: Any) -> Renderer:
    options = {
        "template": "chat",
        "train_on": "response",
        "max_length": 512,
        "too_long": "error",
        "add_eos": True,
    }
    return Renderer(contract(tokenizer, **{**options, **changes}), tokenizer)  # type: ignore[arg-type]


def numbered(*contents: Content) -> list[Row]:
    return [Row(number, f"x.json row {number + 1}", content) for number, content in enumerate(contents)]


SHORT, LONG, EMPTY = (Instruction("a", "", text) for text in ("b", "the answer " * 30, ""))


def test_rows_come_back_as_rendered(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_CHUNK", 2)
    renderer, rows = make(tokenizer), numbered(SHORT, EMPTY, LONG, Text("c"), SHORT)
    told: list[tuple[int, int]] = []
    encoded = encode_rows(rows, renderer, lambda done, total: told.append((done, total)))
    assert told == [(2, 5), (4, 5), (5, 5)]
    assert encoded.numbers.tolist() == [0, 2, 3, 4]
    assert encoded.dropped == {"the answer is empty": [1]}
    assert (encoded.ids.dtype, encoded.trained.dtype) == (np.uint32, np.bool_)
    rendered = [row for row in renderer.render_batch(rows) if isinstance(row, Rendered)]
    for index, row in enumerate(rendered):
        ids, trained = encoded.row(index)
        assert (ids.tolist(), trained.tolist()) == (row.ids, row.trained)
    assert encoded.lengths.tolist() == [len(row.ids) for row in rendered]
    taken = encoded.take(np.array([3, 1]))
    assert taken.numbers.tolist() == [4, 2]
    assert taken.row(1)[0].tolist() == rendered[1].ids
    assert len(encoded.take(np.array([], dtype=np.int64)).ids) == 0


def test_too_long_rows_are_all_reported(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError) as caught:
        encode_rows(numbered(*[LONG] * 30, SHORT), make(tokenizer, max_length=40))
    *listed, summary = caught.value.problems
    assert "30 rows are longer than data.max_length=40" in summary.message
    assert "data.too_long=truncate" in summary.hint
    assert listed[0].place == "x.json row 1"
    assert len(listed) == 5


def test_truncated_and_dropped_rows(tokenizer: Tokenizer) -> None:
    late = Chat((Message("user", "the question " * 50), Message("assistant", "b")))
    rows = numbered(SHORT, LONG, late)
    encoded = encode_rows(rows, make(tokenizer, max_length=40, too_long="truncate"))
    assert encoded.lengths.max() == 40
    assert encoded.truncated[1] > 0
    assert encoded.dropped == {"nothing to train on in the first 40 tokens": [2]}
    encoded = encode_rows(rows, make(tokenizer, max_length=40, too_long="drop"))
    assert encoded.dropped == {"longer than 40 tokens": [1, 2]}
    assert encoded.truncated.tolist() == [0]


def test_rows_that_cannot_be_rendered_are_all_reported(tokenizer: Tokenizer) -> None:
    chat = Chat((Message("user", "a"), Message("assistant", "b")))
    with pytest.raises(DataError) as caught:
        encode_rows(numbered(chat, SHORT, chat), make(tokenizer, template="classic"))
    assert [problem.place for problem in caught.value.problems] == ["x.json row 1", "x.json row 3"]
    assert encode_rows([], make(tokenizer)).ids.size == 0


contents = st.builds(Instruction, hostile_text, hostile_text, hostile_text) | st.builds(
    Text, hostile_text.filter(str.strip)
)


@given(
    rows=st.lists(contents, max_size=6),
    max_length=st.integers(1, 40),
    too_long=st.sampled_from(["truncate", "drop"]),
    train_on=st.sampled_from(["all", "response"]),
    template=st.sampled_from(["chat", "classic"]),
    held=st.sets(st.integers(0, 5)),
)
@settings(max_examples=60)
def test_the_ledger_closes(
    tokenizer: Tokenizer, rows: list[Content], max_length: int, held: set[int], **options: Any
) -> None:
    encoded = encode_rows(numbered(*rows), make(tokenizer, max_length=max_length, **options))
    is_held = np.isin(np.arange(len(encoded)), sorted(held))
    train, held_out = encoded.take(np.flatnonzero(~is_held)), encoded.take(np.flatnonzero(is_held))
    ledger = Ledger.of(len(rows), train, held_out, encoded.dropped)
    ledger.check()
    assert ledger.trained.rows + ledger.held_out.rows == len(encoded)
    assert ledger.trained.trained == int(train.trained.sum())
    assert Ledger.from_json(json.loads(json.dumps(ledger.to_json()))) == ledger


def test_what_the_ledger_says(tokenizer: Tokenizer) -> None:
    encoded = encode_rows(numbered(SHORT, LONG, EMPTY), make(tokenizer, max_length=40, too_long="truncate"))
    ledger = Ledger.of(3, encoded)
    assert ledger.num_dropped == 1
    text = "\n".join(ledger.lines())
    assert "rows    3 = 2 trained + 0 held out + 1 dropped" in text
    assert "1 dropped: the answer is empty" in text
    assert f"{ledger.trained.trained} trained ({ledger.trained_share:.1%})" in text
    assert "max 40" in text
    with pytest.raises(AssertionError, match="no bucket"):
        Ledger.of(4, encoded)
    with pytest.raises(AssertionError, match="two"):
        Ledger.of(3, encoded, encoded)


@pytest.mark.shared
def test_a_real_dataset_closes(shared: Path) -> None:
    from lorafit.data.sources import load_rows

    rows = load_rows([str(shared / "data/alpaca_en_demo.json")])
    renderer = make(
        load(shared / "models/tinyllama-1.1b-chat-skeleton"), template="classic", train_on="all",
        too_long="truncate", add_eos=False,
    )  # fmt: skip
    ledger = Ledger.of(len(rows.rows), encode_rows(rows.rows, renderer))
    assert ledger.trained.rows == 999
    assert ledger.trained.masked == 999  # each BOS
    assert ledger.lengths.max == 512
