"""Word by word: the ids are those of the whole text, and only tokenizers where that is certain go by words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.data.toy_tokenizers import llama_like, load

from lorafit.data import word_cache
from lorafit.data.tokenizer import BORDER, Tokenizer
from lorafit.data.word_cache import SPACE_MARK, Words, can_go_by_words

texts = st.text(f"ab e.\n{SPACE_MARK}한 ", max_size=24) | st.text(max_size=12).filter(
    lambda t: "\ufdd0" not in t
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(llama_like(tmp_path_factory.mktemp("toy")))


def whole(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return list(tokenizer._encode_checked(texts))


@given(batches=st.lists(st.lists(texts, max_size=4), max_size=3), border=st.booleans())
@example(batches=[["  a", f"{SPACE_MARK} a", f"{SPACE_MARK}a  b ", "a b", " ", "", SPACE_MARK]], border=False)
def test_ids_word_by_word_are_those_of_the_text(
    tokenizer: Tokenizer, batches: list[list[str]], border: bool
) -> None:
    assert tokenizer._words is not None
    by_words = Words(tokenizer._encode_checked)
    for batch in batches:
        if border:
            batch = [f"{text}{BORDER}{text} {tokenizer.protect('</s>')} {text}" for text in batch]
        assert list(by_words.encode_batch(batch)) == whole(tokenizer, batch)


def test_the_memory_of_words_is_bounded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_cache, "MAX_CHARACTERS", 10)
    by_words = Words(tokenizer._encode_checked)
    for number in range(20):
        batch = [f"word{number} and others"]
        assert list(by_words.encode_batch(batch)) == whole(tokenizer, batch)
        assert len(by_words._known) <= 3


def spec_of(tokenizer: Tokenizer) -> dict[str, Any]:
    spec: dict[str, Any] = json.loads(tokenizer._rust.to_str())
    return spec


def test_only_where_it_is_certain(tokenizer: Tokenizer) -> None:
    assert can_go_by_words(spec_of(tokenizer))
    for change in (
        lambda spec: spec["model"]["vocab"].update({f"a{SPACE_MARK}b": 99}),
        lambda spec: spec["model"]["vocab"].pop(SPACE_MARK),
        lambda spec: spec["model"].update(ignore_merges=True),
        lambda spec: spec["model"].update(dropout=0.1),
        lambda spec: spec["model"].update(type="Unigram"),
        lambda spec: spec["added_tokens"][0].update(lstrip=True),
        lambda spec: spec["added_tokens"][0].update(special=False),
        lambda spec: spec.update(pre_tokenizer={"type": "Whitespace"}),
        lambda spec: spec.update(normalizer={"type": "NFKC"}),
    ):
        spec = spec_of(tokenizer)
        change(spec)
        assert not can_go_by_words(spec)


@pytest.mark.shared
def test_real_text_with_a_real_tokenizer(shared: Path) -> None:
    tokenizer = load(shared / "models/tinyllama-1.1b-chat-skeleton")
    assert tokenizer._words is not None
    rows = json.loads((shared / "data/alpaca_en_demo.json").read_text())
    texts = [SPACE_MARK + f"{row['instruction']}\n\n{row['input']}  {row['output']}" for row in rows]
    assert list(tokenizer._words.encode_batch(texts)) == whole(tokenizer, texts)
