"""What texts hold: repetitions found by hashes are those found by comparing, and broken characters are not guessed."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.check.text_checks import NEAR, NUM_HASHES, Texts, _signatures
from lorafit.data.formats import Chat, Completion, Content, Instruction, Message, Row, Text

FEW_WORDS = st.lists(st.sampled_from(["a", "b", "c", "A", "d e", " b "]), min_size=1, max_size=4).map(
    " ".join
)


def rows_of(contents: list[Content]) -> list[Row]:
    return [Row(number, f"x row {number + 1}", content) for number, content in enumerate(contents)]


def looked_at(*contents: Content, size: int = 3) -> Texts:
    texts, rows = Texts(), rows_of(list(contents))
    for at in range(0, len(rows), size):
        texts.add(rows[at : at + size])
    return texts


@given(st.lists(FEW_WORDS, min_size=1, max_size=25), st.integers(1, 7))
def test_repeated_rows_are_those_that_say_the_same_words(answers: list[str], size: int) -> None:
    texts = looked_at(*(Instruction("Say.", "", answer) for answer in answers), size=size)
    said = [answer.lower().split() for answer in answers]
    expected = {later for later in range(len(said)) if said[later] in said[:later]}
    repeats = texts.repeats()
    assert {later for later, _ in repeats.exact} == expected
    assert all(said[later] == said[earlier] and earlier < later for later, earlier in repeats.exact)


@given(st.lists(FEW_WORDS, min_size=2, max_size=25), st.data())
def test_leaks_are_the_held_out_rows_that_training_says_too(answers: list[str], data: st.DataObject) -> None:
    held = data.draw(st.lists(st.integers(0, len(answers) - 1), unique=True, max_size=5))
    texts = looked_at(*(Instruction("Say.", "", answer) for answer in answers))
    said = [answer.lower().split() for answer in answers]
    trained = [words for number, words in enumerate(said) if number not in held]
    leaks = texts.leaks(np.array(sorted(held), dtype=np.int64))
    assert {row for row, _ in leaks.exact} == {row for row in held if said[row] in trained}
    assert all(other not in held and said[row] == said[other] for row, other in leaks.exact)


def test_the_share_of_equal_hashes_estimates_the_common_word_triples() -> None:
    generator = random.Random(0)
    words = [f"w{number}" for number in range(400)]
    errors = []
    for changed in (0, 1, 5, 20, 100):
        for _ in range(20):
            one = generator.choices(words, k=150)
            other = [generator.choice(words) if place < changed else word for place, word in enumerate(one)]
            triples = [{(*text, "", "")[i : i + 3] for i in range(150)} for text in (one, other)]
            true = len(triples[0] & triples[1]) / len(triples[0] | triples[1])
            found = _signatures([one, other])
            errors.append(float(np.mean(found[0] == found[1])) - true)
    assert abs(float(np.mean(errors))) < 0.02
    assert float(np.std(errors)) < 0.6 / np.sqrt(NUM_HASHES)


def test_a_row_nearly_the_same_is_found_and_others_are_not() -> None:
    generator = random.Random(1)
    rows = [" ".join(generator.choices([f"w{n}" for n in range(500)], k=120)) for _ in range(300)]
    rows[200] = rows[50] + " indeed"
    repeats = looked_at(*(Text(row) for row in rows), size=64).repeats()
    assert repeats.exact == ()
    assert repeats.near == ((200, 50),)
    assert NEAR / NUM_HASHES > 0.9


@pytest.mark.parametrize(
    "text",
    [
        "Il a dit : « À la liberté\u00a0» et « l'été\u00a0»\u00a0!", "„Spaß“, sagte er, „heißt Spaß”.",
        "C'est déjà\u2026 l'été\u2019s end \u2013 naïve\u2122", "São Paulo, Ícaro, ÀÉÎÕÜ", "5 °C ± 2 µm", "½ ¼ ³ §",
        "한국어 문장입니다.", "Привет, мир!", "日本語の文章。", "Ђ ЃЌ", "🙂👍🏽 family: 👨‍👩‍👧", "نص عربي",
        "Â Ã alone", "ÃO",
    ],
)  # fmt: skip
def test_text_of_any_language_is_not_taken_for_broken(text: str) -> None:
    assert not looked_at(Text(text)).mojibake.rows


@pytest.mark.parametrize(
    "text", ["é", "’", "“quoted”", "–", "한국어", "日本", "😀", "ü", "Привет", "°", "ñ", "€"]
)
@pytest.mark.parametrize("wrong", ["cp1252", "latin-1"])
def test_utf8_read_as_something_else_is_found(text: str, wrong: str) -> None:
    broken = f"a {text.encode().decode(wrong, 'ignore' if wrong == 'cp1252' else 'strict')} b"
    if len(broken) - 4 < len(text.encode()):
        pytest.skip("a byte of it has no place in that encoding")
    assert list(looked_at(Text("fine"), Text(broken)).mojibake.rows) == [1]


def test_answers_that_say_nothing() -> None:
    answers = ["", " \n", "N/A", "none.", "...", "-", "<noinput>", "5", "No", "+1", "🙂", "Yes.", "na na na"]
    texts = looked_at(*(Instruction("Q", "", answer) for answer in answers))
    assert list(texts.empty.rows) == [0, 1]
    assert list(texts.near_empty.rows) == [2, 3, 4, 5, 6]
    turns = (
        Message("user", "Q"),
        Message("assistant", "ok"),
        Message("user", "Q"),
        Message("assistant", "null"),
    )
    assert list(looked_at(Chat(turns)).near_empty.rows) == [0]


def test_marks_of_a_template_are_a_fault_only_where_one_goes_around() -> None:
    text = "### Instruction:\nAdd.\n\n### Response:\n4"
    texts = looked_at(
        Text(text), Completion(text, "4"), Instruction("Add.", "", text), Text("a <|im_end|> b")
    )
    assert list(texts.templated.rows) == [2]
    assert list(texts.controls.rows) == [3]
