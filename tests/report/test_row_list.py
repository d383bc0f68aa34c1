"""What becomes of a row follows from the losses of its visits, and rows that stand out among like rows come first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from lorafit.observe.answer_losses import AnswerLosses
from lorafit.observe.visits import Visits
from lorafit.report.row_list import kind_of, outstanding, stories


@pytest.mark.parametrize(
    ("losses", "kind"),
    [
        ([0.29, 2.0], "known before"),
        ([1.0], "seen once"),
        ([1.0, 0.95], "learned"),
        ([1.0, 0.96], "never learned"),
        ([1.0, 1.4], "never learned"),
        ([1.0, 0.5, 0.75], "forgotten again"),
        ([1.0, 0.5, 0.74], "learned"),
        ([1.0, 0.96, 1.2], "never learned"),
        ([1.0, 0.1], "memorised"),
        ([1.0, 0.02, 0.09], "memorised"),
        ([1.0, 0.02, 0.6], "forgotten again"),
    ],
)
def test_the_kind_of_a_row(losses: list[float], kind: str) -> None:
    assert kind_of(len(losses), losses[0], losses[-1], min(losses)) == kind


def of(*visits: tuple[int, int, float, float]) -> Visits:
    columns = [np.array(column) for column in zip(*visits, strict=True)]
    return Visits(*columns)


def test_visits_of_the_pieces_of_a_row_are_one_visit_of_the_row() -> None:
    losses = [
        (1, 0, 2.0, 1.0),
        (1, 1, 1.0, 0.0),
        (2, 0, 4.0, 3.0),
        (3, 0, 1.0, 0.0),
        (3, 0, 2.0, 0.0),
        (4, 1, 0.5, 0.0),
    ]
    first, second = sorted(
        stories(of(*losses), np.array([9, 5]), np.array([2, 1])), key=lambda story: story.number
    )
    assert (first.visits, first.first, first.last, first.end, first.tokens) == (2, 3.0, 1.5, 2.0, 9)
    assert (second.visits, second.first, second.last, second.lowest) == (2, 1.0, 0.5, 0.5)


def test_only_the_visits_of_the_last_phase_count_and_losses_that_are_no_numbers_do_not() -> None:
    visits = of((1, 0, 9.0, 0.0), (5, 0, 2.0, 0.0), (6, 0, np.nan, 0.0), (7, 0, 1.0, 0.0), (8, 3, 1.0, 0.0))
    (story,) = stories(visits, np.array([4]), np.array([1]), since=4)
    assert (story.visits, story.first, story.last) == (2, 2.0, 1.0)


def test_a_row_is_compared_with_rows_of_like_length() -> None:
    random = np.random.default_rng(0)
    lengths = np.arange(10, 510)
    values = 4 - lengths / 200 + random.normal(0, 0.1, 500)  # shorter answers have higher losses
    values[400] = 2.9  # less than those of all short rows, and much for its length
    apart, usual = outstanding(values, lengths)
    assert int(np.argmax(apart)) == 400
    assert usual[400] == pytest.approx(4 - lengths[400] / 200, abs=0.1)
    assert np.median(apart) == pytest.approx(0, abs=0.2)


def test_a_small_difference_does_not_stand_out_where_all_others_are_equal() -> None:
    visits = [(1, row, 1.0, 0.0) for row in range(101)]
    visits += [(1, row, row % 7 / 2, 0.0) for row in range(101, 202)]
    visits[20], visits[150] = (1, 20, 1.3, 0.0), (1, 150, 6.0, 0.0)
    lengths = np.repeat([10, 500], 101)
    assert stories(of(*visits), lengths, np.ones(202, np.int64))[0].number == 150


def test_the_first_visit_decides_the_order() -> None:
    visits = [(1, row, 2.0, 0.1) for row in range(60)] + [(2, row, 1.0, 0.1) for row in range(60)]
    visits[5], visits[70] = (1, 5, 6.0, 0.1), (2, 10, 9.0, 0.1)
    assert stories(of(*visits), np.full(60, 20), np.ones(60, np.int64))[0].number == 5


@pytest.mark.parametrize(
    ("loss", "end", "reason"), [(6.0, 0.1, "unlikely after"), (5.0, 18.0, "ends where no end")]
)
def test_the_first_of_the_list_stands_out_and_says_why(loss: float, end: float, reason: str) -> None:
    visits = [(1, row, 1.0 + row % 7 / 20, 0.1 + row % 5 / 50) for row in range(60)]
    visits[33] = (1, 33, loss, end)
    listed = stories(of(*visits), np.full(60, 20), np.ones(60, np.int64))
    assert listed[0].number == 33
    assert reason in listed[0].reason
    assert listed[0].score > 2 > 0.5 > listed[1].score


def second_of(*rows: tuple[int, float, float, float]) -> AnswerLosses:
    numbers, *columns = zip(*rows, strict=True)
    return AnswerLosses(np.array(numbers), *(np.array(column, np.float64) for column in columns))


def test_after_a_second_pass_answers_come_first_that_their_question_does_not_explain_or_that_end_early() -> (
    None
):
    visits = of(*((1, row, 1.0 + row / 100, 0.1) for row in range(60)))
    rows = [(row, 1.0, 2.0 + row / 100, 0.1 + row / 1000) for row in range(60)]
    rows[33], rows[21] = (33, 3.0, 2.9, 0.1), (21, 0.5, 2.5, 7.0)  # another's answer; a cut one
    rows[50] = (50, 9.0, np.nan, 0.01)  # it has no question
    listed = stories(visits, np.full(60, 20), np.ones(60, np.int64), second=second_of(*rows))
    assert {story.number for story in listed[:2]} == {21, 33}
    reasons = {story.number: story.reason for story in listed}
    assert reasons[33] == "the question helps the answer little: loss 3.00 with it, 2.90 without it"
    assert reasons[21] == ("the answer ends where no end is likely: loss of its end 7.00, 0.13 in all rows")
    assert [story.alone for story in listed if story.number == 50] == [None]
    assert all(0 <= story.score < 1 for story in listed)


@pytest.mark.parametrize("rows", [range(59), range(1, 61), range(60, 0, -1), []], ids=str)
def test_a_second_pass_that_does_not_have_all_rows_changes_nothing(rows: Sequence[int]) -> None:
    visits = of(*((1, row, 1.0 + row / 100, 0.1) for row in range(60)))
    second = AnswerLosses(np.array(rows, np.int64), *(np.ones(len(rows)) for _ in range(3)))
    plain = stories(visits, np.full(60, 20), np.ones(60, np.int64))
    assert stories(visits, np.full(60, 20), np.ones(60, np.int64), second=second) == plain
