"""A conversation: what is remembered is what was said, and what no longer fits is left out and counted."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny_models import write_model

from lorafit.data.formats import Message
from lorafit.errors import DataError, ModelError
from lorafit.infer.conversation import Conversation
from lorafit.infer.model import Model, load


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(write_model(tmp_path_factory.mktemp("talk") / "model"), device="cpu", dtype="float32")


def test_turns_and_the_system_prompt_are_read(model: Model) -> None:
    talk = Conversation(model, 10)
    first = talk.ask("Hi")
    assert first.messages == (Message("user", "Hi"),)
    talk.answered(first, "Hello")
    talk.system = "Be brief."
    second = talk.ask("And?")
    assert second.messages == (
        Message("system", "Be brief."),
        Message("user", "Hi"),
        Message("assistant", "Hello"),
        Message("user", "And?"),
    )
    assert second.num_dropped == 0
    talk.answered(second, "")  # nothing was said
    assert talk.turns == [*first.messages, Message("assistant", "Hello")]
    talk.reset()
    assert talk.ask("Again").messages == (Message("system", "Be brief."), Message("user", "Again"))


@given(
    st.lists(st.tuples(st.integers(1, 120), st.integers(1, 60)), min_size=1, max_size=12), st.integers(1, 300)
)
def test_the_newest_turns_that_fit_are_kept(
    model: Model, lengths: list[tuple[int, int]], max_tokens: int
) -> None:
    limit = model.network.arch.max_position_embeddings
    room = min(max_tokens, limit // 4)
    talk = Conversation(model, max_tokens)
    said: list[Message] = []

    def length(turns: list[Message]) -> int:
        return len(model.renderer.prompt_ids(turns))

    for number, (asked, answered) in enumerate(lengths):
        before = len(talk.turns) // 2
        question = Message("user", chr(97 + number) * asked)
        turn = talk.ask(question.content)
        kept = list(turn.messages)
        assert [*said, question][-len(kept) :] == kept
        assert len(kept) // 2 + turn.num_dropped == before
        assert length(kept) + room <= limit or len(kept) == 1
        if turn.num_dropped:
            longer = [*said, question][-len(kept) - 2 :]
            assert length(longer) + room > limit
        talk.answered(turn, "z" * answered)
        said += [question, Message("assistant", "z" * answered)]


def test_a_question_that_never_fits_changes_nothing(model: Model) -> None:
    talk = Conversation(model, 10)
    talk.answered(talk.ask("Hi"), "Hello")
    before = list(talk.turns)
    with pytest.raises(ModelError, match="the model reads at most 255"):
        talk.ask("x" * 300)
    with pytest.raises(DataError, match="noncharacter"):
        talk.ask("\ufdd0")
    assert talk.turns == before


def test_single_instructions_are_asked_by_themselves(tmp_path: Path) -> None:
    model = load(write_model(tmp_path / "model", chat=False), device="cpu", dtype="float32")
    talk = Conversation(model, 10)
    assert not talk.remembers
    talk.answered(talk.ask("Hi"), "Hello")
    assert talk.ask("And?").messages == (Message("user", "And?"),)
