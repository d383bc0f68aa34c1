"""Encoding: the flat arrays hold the rendered rows, fitted to the contract; nothing is lost silently."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.toy_tokenizers import hostile_text, llama_like, load

from lorafit.data.formats import Chat, Content, Instruction, Message, Row, Text
from lorafit.data.ledger import DroppedRows, Ledger
from lorafit.data.pieces import split
from lorafit.data.prompt import Rendered, Renderer, contract
from lorafit.data.sources import Chunk, find_sources
from lorafit.data.token_dataset import TokenDataset, encode_chunks, open_encoded
from lorafit.data.tokenizer import Tokenizer
from lorafit.errors import DataError, RunError


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


def encode_rows(
    rows: list[Row], renderer: Renderer, size: int = 2, progress: Callable[[], None] | None = None
) -> TokenDataset:
    """`rows` encoded in chunks of `size`; each starts in the line that is its number."""
    chunks = [
        Chunk(rows[at : at + size], [row.number for row in rows[at : at + size]], name="x.json")
        for at in range(0, len(rows), size)
    ]
    with tempfile.TemporaryDirectory() as folder:
        facts = encode_chunks(chunks, renderer, Path(folder), progress=progress)
        return open_encoded(Path(folder), json.loads(json.dumps(facts)))


def lists(dropped: Mapping[str, Any]) -> dict[str, list[int]]:
    return {reason: numbers.tolist() for reason, numbers in dropped.items()}


SHORT, LONG, EMPTY = (Instruction("a", "", text) for text in ("b", "the answer " * 30, ""))


def test_rows_come_back_as_rendered(tokenizer: Tokenizer) -> None:
    renderer, rows = make(tokenizer), numbered(SHORT, EMPTY, LONG, Text("c"), SHORT)
    told: list[int] = []
    encoded = encode_rows(rows, renderer, progress=lambda: told.append(1))
    assert len(told) == 3
    assert encoded.numbers.tolist() == [0, 2, 3, 4]
    assert lists(encoded.dropped) == {"the answer is empty": [1]}
    assert encoded.flat.tokens.dtype == np.uint16
    rendered = [row for row in renderer.render_batch(rows) if isinstance(row, Rendered)]
    for index, row in enumerate(rendered):
        ids, trained = encoded.row(index)
        assert (ids.tolist(), trained.tolist()) == (row.ids, row.trained)
        assert not ids.flags.writeable
    assert encoded.lengths.tolist() == [len(row.ids) for row in rendered]
    assert encoded.targets.tolist() == [sum(row.trained) for row in rendered]
    taken = encoded.take(np.array([3, 1])).take(np.array([1, 0, 1]))
    assert taken.numbers.tolist() == [2, 4, 2]
    assert (taken.number(1), taken.line_of(4)) == (4, 4)
    assert taken.row(1)[0].tolist() == rendered[3].ids
    assert taken.flat is encoded.flat  # nothing was copied
    assert taken.lengths.tolist() == [len(rendered[index].ids) for index in (1, 3, 1)]
    assert len(encoded.take(np.array([], dtype=np.int64)).lengths) == 0


def test_large_vocabularies_take_more_bits(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = encode_rows(numbered(SHORT, LONG), make(tokenizer))
    monkeypatch.setattr(tokenizer, "vocab_size", 1 << 16)
    wide = encode_rows(numbered(SHORT, LONG), make(tokenizer))
    assert (narrow.flat.tokens.dtype, wide.flat.tokens.dtype) == (np.uint16, np.uint32)
    assert all((narrow.row(index)[0] == wide.row(index)[0]).all() for index in range(2))


def test_too_long_rows_are_all_reported(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError) as caught:
        encode_rows(numbered(*[LONG] * 30, SHORT), make(tokenizer, max_length=40))
    [problem] = caught.value.problems
    assert "30 rows are longer than data.max_length=40" in problem.message
    assert "data.too_long=truncate" in problem.hint
    assert problem.place.startswith("x.json row 1; x.json row 2; ")
    assert problem.place.endswith("x.json row 5 and 25 more")


def test_a_length_is_offered_only_where_the_model_reads_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for most, is_offered in ((None, True), (10_000, True), (50, False)):
        with pytest.raises(DataError) as caught:
            encode_chunks(
                [Chunk(numbered(LONG), [0])], make(tokenizer, max_length=40), tmp_path, most_readable=most
            )
        hint = caught.value.problems[0].hint
        assert ("data.max_length=" in hint) == is_offered
        assert ("reads at most 50 tokens" in hint) != is_offered


def test_truncated_and_dropped_rows(tokenizer: Tokenizer) -> None:
    late = Chat((Message("user", "the question " * 50), Message("assistant", "b")))
    rows = numbered(SHORT, LONG, late)
    encoded = encode_rows(rows, make(tokenizer, max_length=40, too_long="truncate"))
    assert encoded.lengths.max() == 40
    assert encoded.truncated[1] > 0
    assert lists(encoded.dropped) == {"nothing to train on in the first 40 tokens": [2]}
    encoded = encode_rows(rows, make(tokenizer, max_length=40, too_long="drop"))
    assert lists(encoded.dropped) == {"longer than 40 tokens": [1, 2]}
    assert encoded.truncated.tolist() == [0]


@given(
    length=st.integers(1, 90), longest=st.integers(8, 40), has_bos=st.booleans(), untrained=st.integers(0, 5)
)
def test_pieces_hold_each_token_and_train_it_once(
    length: int, longest: int, has_bos: bool, untrained: int
) -> None:
    ids = list(range(has_bos ^ 1, length + 1))
    trained = [number >= max(1, untrained) for number in range(len(ids))]
    pieces = split(Rendered(ids, trained), longest, 0)
    assert all(0 < len(piece.ids) == len(piece.trained) <= longest for piece in pieces)
    assert [
        i for piece in pieces for i, is_target in zip(piece.ids, piece.trained, strict=True) if is_target
    ] == [i for i, is_target in zip(ids, trained, strict=True) if is_target]
    assert not any(piece.trained[0] for piece in pieces)
    for before, piece in pairwise(pieces):
        body = piece.ids[has_bos:]
        assert piece.ids[:has_bos] == ids[:has_bos]
        assert body[: longest // 8] == before.ids[-(longest // 8) :]
        assert body == list(range(body[0], body[0] + len(body)))


def test_rows_that_cannot_be_rendered_are_all_reported(tokenizer: Tokenizer) -> None:
    chat = Chat((Message("user", "a"), Message("assistant", "b")))
    with pytest.raises(DataError) as caught:
        encode_rows(numbered(chat, SHORT, chat), make(tokenizer, template="classic"))
    [problem] = caught.value.problems
    assert (problem.message[:7], problem.place) == ("2 rows:", "x.json rows 1, 3")
    assert "data.bad_rows=drop" in problem.hint
    assert len(encode_rows([], make(tokenizer))) == 0


def test_rows_that_cannot_be_rendered_are_dropped_where_that_is_wanted(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    chat = Chat((Message("user", "a"), Message("assistant", "b")))
    chunk = Chunk(numbered(chat, SHORT, chat), [0] * 3, [(3, "is not JSON")], "x.json")
    facts = encode_chunks([chunk], make(tokenizer, template="classic"), tmp_path, drops=True)
    encoded = open_encoded(tmp_path, facts)
    assert [numbers.tolist() for numbers in encoded.dropped.values()] == [[3], [0, 2]]
    assert Ledger.of(4, encoded).num_dropped == 3


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
    size=st.integers(1, 7),
)
@settings(max_examples=60)
def test_the_ledger_closes(
    tokenizer: Tokenizer, rows: list[Content], max_length: int, held: set[int], size: int, **options: Any
) -> None:
    encoded = encode_rows(numbered(*rows), make(tokenizer, max_length=max_length, **options), size)
    is_held = np.isin(np.arange(len(encoded)), sorted(held))
    train, held_out = encoded.take(np.flatnonzero(~is_held)), encoded.take(np.flatnonzero(is_held))
    ledger = Ledger.of(len(rows), train, held_out, encoded.dropped)
    ledger.check()
    assert ledger.trained.rows + ledger.held_out.rows == len(encoded)
    assert ledger.trained.trained == sum(int(train.row(index)[1].sum()) for index in range(len(train)))
    assert {reason: list(rows.first) for reason, rows in ledger.dropped.items()} == lists(encoded.dropped)
    assert Ledger.from_json(json.loads(json.dumps(ledger.to_json()))) == ledger
    assert "pairs" not in ledger.to_json()
    assert Ledger.from_json({**ledger.to_json(), "pairs": {}}) == ledger  # a file of an earlier version


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


def test_the_ledger_names_the_first_dropped_rows_and_counts_all(tokenizer: Tokenizer) -> None:
    count = DroppedRows.MAX_LISTED + 5
    ledger = Ledger.of(count + 1, encode_rows(numbered(*[EMPTY] * count, SHORT), make(tokenizer), size=512))
    dropped = ledger.to_json()["dropped"]["the answer is empty"]
    assert (dropped["rows"], dropped["first"]) == (count, list(range(DroppedRows.MAX_LISTED)))


@pytest.mark.skipif(not hasattr(os, "pread"), reason="maps the files instead")
def test_tokens_that_cannot_be_read_are_an_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    facts = encode_chunks([Chunk(numbered(SHORT, LONG), [0, 0])], make(tokenizer), tmp_path)
    encoded = open_encoded(tmp_path, facts)
    (tmp_path / "tokens.bin").write_bytes(b"")
    with pytest.raises(RunError, match="tokens are missing"):
        encoded.row(1)
    folder = os.open(tmp_path, os.O_RDONLY)
    os.dup2(folder, encoded.flat.tokens._descriptor)  # reading a folder fails
    os.close(folder)
    with pytest.raises(RunError, match="cannot be read"):
        encoded.row(0)


@pytest.mark.shared
def test_a_real_dataset_closes(shared: Path) -> None:
    reader = find_sources([str(shared / "data/alpaca_en_demo.json")]).reader()
    rows = [row for chunk in reader.chunks() for row in chunk.rows]
    renderer = make(
        load(shared / "models/tinyllama-1.1b-chat-skeleton"), template="classic", train_on="all",
        too_long="truncate", add_eos=False,
    )  # fmt: skip
    ledger = Ledger.of(len(rows), encode_rows(rows, renderer, size=256))
    assert ledger.trained.rows == 999
    assert ledger.trained.masked == 999  # each BOS
    assert ledger.lengths.max == 512
