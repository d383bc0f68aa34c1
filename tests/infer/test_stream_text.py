"""The text of an answer as it comes is the whole answer, cut where a stop text begins, with nothing shown too early."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny_models import byte_tokenizer, write_model

from lorafit.data.tokenizer import Tokenizer
from lorafit.infer.stream_text import AnswerText, TokenTexts


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(write_model(tmp_path_factory.mktemp("text") / "model"))


def said(text: str) -> list[int]:
    return list(byte_tokenizer().encode(text, add_special_tokens=False).ids)


def pieces(tokenizer: Tokenizer, text: str, stops: list[str], strip: bool) -> tuple[list[str], bool]:
    answer = AnswerText(tokenizer, stops, strip)
    shown = []
    for token in said(text):
        shown.append(answer.push(token))
        if answer.is_stopped:
            break
    return [*shown, answer.finish()], answer.is_stopped


ALPHABET = st.sampled_from("ab \né")


@given(
    st.text(ALPHABET, max_size=25),
    st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3),
    st.booleans(),
)
def test_pieces_join_to_the_text_before_the_first_stop(
    tokenizer: Tokenizer, text: str, stops: list[str], strip: bool
) -> None:
    shown, is_stopped = pieces(tokenizer, text, stops, strip)
    # the stop text that is complete first ends the answer, the earlier begun where several are
    ends = [at + len(stop) for stop in stops if (at := text.find(stop)) >= 0]
    expected = text
    if ends:
        done = text[: min(ends)]
        expected = done[: min(at for stop in stops if (at := done.find(stop)) >= 0)]
    assert "".join(shown) == (expected.strip() if strip else expected)
    assert is_stopped == bool(ends)


def test_what_may_be_a_stop_text_waits(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, "one###two", ["###"], True) == (["o", "n", "e", "", "", "", ""], True)
    assert pieces(tokenizer, "a##b", ["###"], True) == (["a", "", "", "##b", ""], False)
    assert pieces(tokenizer, "a##", ["###"], True) == (["a", "", "", "##"], False)
    assert pieces(tokenizer, " a ", [], False)[0] == [" ", "a", " ", ""]
    assert pieces(tokenizer, "ab", [""], False) == (["a", "b", ""], False)


def test_a_token_has_the_text_that_it_adds(tokenizer: Tokenizer) -> None:
    texts = TokenTexts(tokenizer)
    (space,) = said(" ")
    assert (texts.of(space).text, texts.of(space).data) == (" ", b" ")
    half = said("é")[0]
    assert texts.of(half).data is None
    assert texts.of(257).text == "</s>"


@pytest.mark.shared
def test_a_blank_that_a_word_begins_with_is_seen(shared: Path) -> None:
    tokenizer = Tokenizer.from_folder(shared / "models" / "tinystories-656k")
    ids = tokenizer.encode("Once upon a time")
    texts = TokenTexts(tokenizer)
    assert "".join(texts.of(token).text for token in ids).strip() == "Once upon a time"
