"""Masks of generated conversations are exact in every chat format, with every kind of tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.data.chat_formats import FORMATS
from tests.data.masks import Kind, Tally, check, check_tools, conversations, kinds
from tests.shared_files import shared_dir

from lorafit.data import chat_template, prompt

EACH = 6  # conversations of each format with each tokenizer; `make masks` takes 500


@pytest.fixture(scope="module")
def makers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    return kinds(tmp_path_factory.mktemp("masks"), None)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_trained_is_the_answers(makers: dict[str, Kind], name: str) -> None:
    for title, kind in makers.items():
        tally = Tally()
        check(FORMATS[name], kind, name, list(conversations(EACH, FORMATS[name], (title, name))), tally)
        assert tally.exact + sum(tally.refused.values()) == EACH


@pytest.mark.parametrize("name", FORMATS)
def test_calls_are_trained_and_results_are_not(makers: dict[str, Kind], name: str) -> None:
    for title in ("byte-level BPE", "SentencePiece-like BPE"):
        tally = Tally()
        check_tools(FORMATS[name], makers[title], name, EACH, (title, name), tally)
        assert tally.exact > EACH // 2


@pytest.mark.shared
@pytest.mark.parametrize("name", ["zephyr", "llama2", "qwen3"])
def test_what_is_trained_is_the_answers_with_tinyllamas_tokenizer(tmp_path: Path, name: str) -> None:
    kind, tally = kinds(tmp_path, shared_dir())["TinyLlama"], Tally()
    check(FORMATS[name], kind, name, list(conversations(25, FORMATS[name], name)), tally)
    assert tally.exact > 15


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("chatml", lambda p: p.setattr(prompt, "_continue", _one_character_late)),
        ("qwen3", lambda p: p.setattr(chat_template.ChatTemplate, "_empty_thought", lambda *_: "")),
        ("llama2", lambda p: p.setattr(prompt.Renderer, "_ends_in_eos", lambda *_: True)),
        ("zephyr", lambda p: p.setattr(prompt.Renderer, "_bos", lambda *_: [])),
    ],
)
def test_the_check_sees_mistakes(
    makers: dict[str, Kind],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    spoil: Callable[[pytest.MonkeyPatch], None],
) -> None:
    spoil(monkeypatch)
    kind = makers["SentencePiece-like BPE"]
    with pytest.raises(AssertionError, match=f"^{name}, row"):
        check(FORMATS[name], kind, name, list(conversations(EACH, FORMATS[name], name)), Tally())


def _one_character_late(segments: list[prompt._Segment], answer: str) -> None:
    segments[-1].text += answer[:1]
    segments.append(prompt._Segment(answer[1:], answer=True))
