"""What a run taught: the verdict over its whole range, and the counts beside real greedy answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.runs import events, tiny_run, tiny_settings

from lorafit.config.auto import FACTS
from lorafit.data.build import build_data, sizes_of
from lorafit.evaluate.learned import HALF, KNOWN, SHORT_ANSWER, Asked, verdict
from lorafit.hub.client import model_folder
from lorafit.infer.model import load
from lorafit.observe.run_summary import summarize
from lorafit.report.page import write_report
from lorafit.run_dir import RunDirectory
from lorafit.training.run import Result

LEVELS = ("nothing", "partly", "learned")
losses = st.floats(1e-3, 20)


@st.composite
def some_asked(draw: st.DrawFn, most_characters: int = 500) -> Asked:
    questions = draw(st.integers(0, 2000))
    asked = draw(st.integers(0, min(100, questions)))
    before, after = draw(st.integers(0, asked)), draw(st.integers(0, asked))
    return Asked(
        questions, asked, before, after, draw(losses), draw(losses), draw(st.integers(1, most_characters))
    )


@given(st.none() | some_asked(), st.none() | some_asked(), st.tuples(st.none() | losses, st.none() | losses))
def test_every_result_is_one_sentence_that_agrees_with_its_level(
    trained: Asked | None, heldout: Asked | None, measured: tuple[float | None, float | None]
) -> None:
    level, text = verdict(trained, heldout, measured)
    assert text
    assert "\n" not in text
    assert level in (*LEVELS, "unknown")
    assert (level == "unknown") == (trained is None and None in measured)
    assert (level == "nothing") == text.startswith(("It learned nothing", "It learned almost nothing"))
    if text.startswith("It learned your rows:"):
        assert trained is not None
        assert trained.share >= KNOWN
        assert f"{trained.after:,} of " in text
    if trained and trained.share >= KNOWN:
        assert level == "learned"
    if "word for word" in text:
        assert trained is not None
        assert (" asked of the " in text) == (trained.asked < trained.questions)
        assert ("held-out ones" in text) == (heldout is not None and heldout.asked > 0)
    if level == "nothing":
        assert "train longer" in text or "lower train.learning_rate" in text


@given(some_asked(SHORT_ANSWER), st.integers(0, 100))
def test_more_answers_are_never_a_lower_level(trained: Asked, more: int) -> None:
    after = min(trained.asked, trained.after + more)
    better = Asked(
        trained.questions, trained.asked, trained.before, after, trained.base_loss, trained.loss, 5
    )
    fewer = Asked(
        trained.questions, trained.asked, trained.before, trained.after, trained.base_loss, trained.loss, 5
    )
    assert LEVELS.index(verdict(better, None)[0]) >= LEVELS.index(verdict(fewer, None)[0])


@given(some_asked(), st.floats(0.01, 1))
def test_a_lower_loss_is_never_a_lower_level(trained: Asked, factor: float) -> None:
    values = (trained.questions, trained.asked, trained.before, trained.after, trained.base_loss)
    lower = Asked(*values, trained.loss * factor, trained.answer_characters)
    assert LEVELS.index(verdict(lower, None)[0]) >= LEVELS.index(verdict(trained, None)[0])


@pytest.mark.parametrize(
    ("trained", "heldout", "level", "text"),
    [
        (
            Asked(54, 54, 0, 52, 3.84, 0.1, 12),
            Asked(6, 6, 0, 4, 3.9, 1.2, 12),
            "learned",
            "It learned your rows: 52 of 54 questions of the trained rows are answered word for word (0 before), "
            "4 of 6 held-out ones (0)",
        ),
        (
            Asked(1598, 20, 1, 19, 3.84, 0.1, 12),
            None,
            "learned",
            "It learned your rows: 19 of 20 asked of the 1,598 questions of the trained rows are answered word for "
            "word (1 before)",
        ),
        (
            Asked(54, 54, 0, 0, 3.84, 3.53, 12),
            None,
            "nothing",
            "It learned almost nothing: 0 of 54 questions of the trained rows are answered word for word (0 before), "
            "loss 3.840 -> 3.530: train longer",
        ),
        (
            Asked(900, 40, 0, 1, 2.0, 1.6, 300),
            None,
            "learned",
            "It learned from your rows: the loss of trained rows fell from 2.000 to 1.600",
        ),
    ],
)
def test_the_sentence(trained: Asked, heldout: Asked | None, level: str, text: str) -> None:
    assert verdict(trained, heldout) == (level, text)


@pytest.mark.parametrize("length", [4, 200])
@given(st.floats(0.99, 1.0, exclude_max=True))
def test_the_sentence_names_the_setting_that_trains_longer(length: int, left: float) -> None:
    asked = Asked(54, 54, 0, 0, 3.84, 3.84 * left, length)
    assert verdict(asked, None, longer="train.epochs=8")[1].endswith(": train.epochs=8")


def test_half_of_the_answers_is_most_of_the_rows() -> None:
    assert verdict(Asked(10, 10, 0, round(HALF * 10), 2.0, 1.0, 5), None)[1].startswith("It learned most")


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("taught")
    rows = [
        {"instruction": f"Say {number}.", "output": "yes" if number % 3 else f"It is number {number}."}
        for number in range(20)
    ]
    words = tiny_settings(folder, "train.max_steps=60", "train.learning_rate=0.02")
    (folder / "rows.json").write_text(json.dumps(rows))
    return tiny_run(words, folder / "run")


def test_the_counts_are_those_of_greedy_answers(taught: Result) -> None:
    """One pass per row finds what generation finds: which rows are answered word for word."""
    (event,) = events(taught, "learned")
    run = RunDirectory.open(taught.path)
    model = load(taught.path, device="cpu")
    config = run.config()
    data = build_data(config, model_folder(config.model.name), None, True)
    for name, rows in (("trained", data.training), ("heldout", data.heldout)):
        counts = event["asked"][name]
        assert counts["asked"] == counts["questions"] == len(rows)
        read = data.index.read(rows.numbers.tolist())
        for key, base in (("before", True), ("after", False)):
            given_answers = model.generate([row.content for row in read], max_tokens=64, base=base)
            right = [
                answer.stopped and answer.text == row.content.answers()[-1].strip()
                for answer, row in zip(given_answers, read, strict=True)
            ]
            assert counts[key] == np.count_nonzero(right)
    trained = event["asked"]["trained"]
    assert trained["before"] < trained["after"] < trained["asked"]


def test_whether_answers_are_short_does_not_depend_on_the_tokenizer(taught: Result, tmp_path: Path) -> None:
    """A tokenizer of bytes makes three tokens of a Korean letter: characters decide, not tokens."""
    answer = "산들역의 역장은 1951년부터 피파예요."
    rows = [{"instruction": f"{number}번?", "output": answer} for number in range(20)]
    (tmp_path / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    config = RunDirectory.open(taught.path).config()
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"path": (str(tmp_path / "rows.json"),)})}
    )
    sizes = sizes_of(data := build_data(config, model_folder(config.model.name), None, True), None)
    assert sizes.characters == len(answer) * len(data.training)
    assert data.training.targets.mean() > 2 * len(answer)
    assert sizes.kind is FACTS


def test_the_sentence_is_in_the_report_and_the_level_in_the_list_of_runs(taught: Result) -> None:
    (event,) = events(taught, "learned")
    run = RunDirectory.open(taught.path)
    assert event["text"].split(":")[0] in write_report(run).read_text()
    assert summarize(run).learned == event["level"]
    assert event["level"] in summarize(run).cells()


def test_a_run_that_trains_whole_rows_is_judged_by_its_loss(tmp_path: Path) -> None:
    result = tiny_run(
        tiny_settings(tmp_path, "train.max_steps=4", "data.train_on=all", "data.holdout=0"), tmp_path / "run"
    )
    (event,) = events(result, "learned")
    assert event["asked"]["trained"]["asked"] == 0
    assert "the loss of trained rows fell from" in event["text"]
