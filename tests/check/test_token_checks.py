"""Tokens held against answers: right rows of every kind of model pass, and each way of going wrong is named."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from tests.data.contents import NAMES, contents, swallows_system
from tests.data.toy_tokenizers import load, toys

from lorafit.check.token_checks import Tokens
from lorafit.data import token_dataset
from lorafit.data.formats import Chat, Content, Instruction, Message, Row
from lorafit.data.prompt import Rendered, Renderer, contract
from lorafit.data.sources import Chunk
from lorafit.data.token_dataset import encode_chunks, open_encoded
from lorafit.data.tokenizer import Tokenizer

ROWS = [Row(n, f"x row {n + 1}", Instruction(f"Say {n}.", "", f"The answer is {n}.")) for n in range(6)]
Spoil = Callable[[Rendered], Rendered]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {name: load(folder) for name, folder in toys(tmp_path_factory.mktemp("toys")).items()}


def make(tokenizer: Tokenizer, **changes: Any) -> Renderer:
    options: dict[str, Any] = {
        "template": "auto", "train_on": "response", "max_length": 512, "too_long": "truncate", "add_eos": True,
    }  # fmt: skip
    return Renderer(contract(tokenizer, **{**options, **changes}), tokenizer)


def looked_at(renderer: Renderer, rows: list[Row], spoil: Spoil | None = None, at: int = 3) -> Tokens:
    """The rows encoded, that at index `at` spoilt on the way, and looked at."""
    given = renderer
    if spoil is not None:

        class Spoilt(Renderer):
            def render_batch(self, rows: Any) -> Any:
                outcomes = super().render_batch(rows)
                outcomes[at] = spoil(outcomes[at])  # type: ignore[arg-type]
                return outcomes

        given = Spoilt(renderer.contract, renderer.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        facts = encode_chunks([Chunk(rows, [0] * len(rows))], given, Path(folder))
        tokens = Tokens(renderer, open_encoded(Path(folder), facts))
        tokens.add(rows)
    return tokens


def faults(tokens: Tokens) -> dict[str, list[int]]:
    names = ("no_stop", "no_bos", "more_bos", "wrong", "changed", "cut")
    return {name: list(rows) for name in names if (rows := getattr(tokens, name).rows)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("train_on", ["response", "all"])
@settings(max_examples=20)
@given(content=contents)
def test_right_rows_pass(
    tokenizers: dict[str, Tokenizer], name: str, train_on: str, content: Content
) -> None:
    """Whatever the text: at most the tokenizer is said to change it (NFC, or a character that it lacks)."""
    if name == "llama2" and swallows_system(content):
        return
    whole = make(tokenizers[name], train_on=train_on, max_length=100_000)
    tokens = looked_at(whole, [Row(0, "x row 1", content)])
    assert set(faults(tokens)) <= {"changed"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("train_on", ["response", "all"])
def test_what_a_template_leaves_out_is_no_fault(
    tokenizers: dict[str, Tokenizer], name: str, train_on: str
) -> None:
    """Qwen 3 drops the thinking of all turns but the last."""
    turns = [
        Message(role, text)  # type: ignore[arg-type]
        for role, text in zip(
            ["user", "assistant"] * 2,
            ["What?", "<think>\nHm.\n</think>\n\nThis.", "And?", "That."],
            strict=True,
        )
    ]
    tokens = looked_at(make(tokenizers[name], train_on=train_on), [Row(0, "x row 1", Chat(tuple(turns)))])
    assert faults(tokens) == {}


@pytest.mark.parametrize("name", NAMES)
def test_plain_rows_pass_without_a_word(tokenizers: dict[str, Tokenizer], name: str) -> None:
    tokens = looked_at(make(tokenizers[name]), ROWS)
    assert faults(tokens) == {}
    assert tokens.num_rows == tokens.num_answers == tokens.num_stopped == len(ROWS)


def unmasked_stop(row: Rendered) -> Rendered:
    """The stop token is there but not trained."""
    last = max(index for index, flag in enumerate(row.trained) if flag)
    return Rendered(row.ids, [flag and index != last for index, flag in enumerate(row.trained)])


def shifted(row: Rendered) -> Rendered:
    """The mask begins one token late."""
    first = row.trained.index(True)
    return Rendered(row.ids, [flag and index != first for index, flag in enumerate(row.trained)])


def early(row: Rendered) -> Rendered:
    """The mask begins in the question."""
    first = row.trained.index(True)
    return Rendered(
        row.ids,
        [flag or index in (first - 3, first - 2, first - 1) for index, flag in enumerate(row.trained)],
    )


def other_token(row: Rendered) -> Rendered:
    """A token of the answer is another one."""
    first = row.trained.index(True)
    ids = list(row.ids)
    ids[first + 1] = ids[first + 2]
    return Rendered(ids, row.trained)


def nothing_but_the_stop(row: Rendered) -> Rendered:
    last = max(index for index, flag in enumerate(row.trained) if flag)
    return Rendered(row.ids, [index == last for index in range(len(row.ids))])


SPOILT: dict[str, tuple[Spoil, str]] = {
    "stop token not trained": (unmasked_stop, "no_stop"),
    "mask one late": (shifted, "wrong"),
    "mask too early": (early, "wrong"),
    "another token": (other_token, "wrong"),
    "only the stop": (nothing_but_the_stop, "wrong"),
}


@pytest.mark.parametrize("name", ["qwen", "zephyr", "llama2", "llama3"])
@pytest.mark.parametrize("fault", SPOILT)
def test_a_spoilt_row_is_named(tokenizers: dict[str, Tokenizer], name: str, fault: str) -> None:
    spoil, kind = SPOILT[fault]
    found = faults(looked_at(make(tokenizers[name]), ROWS, spoil))
    assert found.get(kind) == [3]
    assert all(rows == [3] for rows in found.values())


def test_bos_once(tokenizers: dict[str, Tokenizer]) -> None:
    renderer = make(tokenizers["zephyr"])
    bos = renderer.contract.bos_id
    assert bos is not None
    twice = looked_at(renderer, ROWS, lambda row: Rendered([bos, *row.ids], [False, *row.trained]))
    assert faults(twice) == {"more_bos": [3]}
    never = looked_at(renderer, ROWS, lambda row: Rendered(row.ids[1:], row.trained[1:]))
    assert faults(never) == {"no_bos": [3]}


def test_a_cut_row_is_no_wrong_row(tokenizers: dict[str, Tokenizer]) -> None:
    long = [Row(0, "x row 1", Instruction("Say.", "", "The answer is é 한국어. " * 20)), *ROWS[1:]]
    for limit in range(40, 60):
        assert faults(looked_at(make(tokenizers["zephyr"], max_length=limit), long))["cut"][0] == 0
        assert set(faults(looked_at(make(tokenizers["zephyr"], max_length=limit), long))) == {"cut"}


def test_a_row_of_which_nothing_is_trained_is_named(
    tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder drops such rows; that it did not is a fault to be named, not one to fall over."""
    monkeypatch.setattr(token_dataset._Writer, "_fit", lambda self, row, outcome: (outcome, 0), raising=True)
    found = faults(
        looked_at(make(tokenizers["zephyr"]), ROWS, lambda row: Rendered(row.ids, [False] * len(row.ids)))
    )
    assert found == {"wrong": [3]}
