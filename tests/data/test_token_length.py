"""No text has fewer tokens than is known before it is encoded, and where nothing is known, that is 0."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data.toy_tokenizers import load, toys
from tests.tiny_models import byte_tokenizer

from lorafit.data.token_length import TokenLength
from lorafit.data.tokenizer import Tokenizer

texts = st.builds(
    lambda parts, times: "".join(parts) * times,
    st.lists(
        st.sampled_from(
            ["a", "the ", "    ", "\n", "\x04", "é", "e\u0301", "\u1112\u1161\u11ab", "한국", "\U0001f600"]
        )
        | st.text(max_size=6).filter(
            lambda text: not any("\ufdd0" <= character <= "\ufdd4" for character in text)
        ),
        max_size=6,
    ),
    st.integers(0, 30),
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    return [load(folder) for folder in toys(tmp_path_factory.mktemp("toys")).values()]


@given(text=texts)
def test_no_text_has_fewer_tokens(text: str, tokenizers: list[Tokenizer]) -> None:
    for tokenizer in tokenizers:
        assert tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text))


def test_a_long_text_is_known_to_have_many(tokenizers: list[Tokenizer]) -> None:
    assert all(tokenizer.fewest_tokens("word " * 10_000) > 500 for tokenizer in tokenizers)


def spec(**changes: Any) -> dict[str, Any]:
    """The tokenizer.json of the tiny models, in which each byte is a token."""
    return {**json.loads(byte_tokenizer().to_str()), **changes}


def test_bytes_that_are_left_out_do_not_count() -> None:
    changed = spec(added_tokens=[])
    assert TokenLength(changed).fewest("a\x04b") == 3
    del changed["model"]["vocab"]["Ą"]  # byte 4
    assert TokenLength(changed).fewest("a\x04b") == 2
    assert TokenLength(spec()).fewest("a" * 130) == 130 // len("<|assistant|>")


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}},
        {"normalizer": {"type": "Replace", "pattern": {"String": "ab"}, "content": "c"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"String": " "},
                "behavior": "Removed",
                "invert": False,
            }
        },
        {"pre_tokenizer": None},
        {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}},
        {"added_tokens": [{"content": "x", "lstrip": True, "rstrip": False}]},
    ],
    ids=str,
)
def test_nothing_is_known_where_text_can_be_left_out(changes: dict[str, Any]) -> None:
    assert TokenLength(spec(**changes)).fewest("a" * 10_000) == 0
