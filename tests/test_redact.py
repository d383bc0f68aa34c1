"""What is shown or printed as JSON steers no terminal and says the same."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from lorafit.check.verdict import MAX_LISTED, of_error
from lorafit.errors import ModelError, Problem
from lorafit.redact import json_line

STEERING = "\x1b\x07\x7f\x9b\u200e\u2028\u202e\u2066"
values = st.recursive(
    st.text() | st.sampled_from(list(STEERING)) | st.integers(), lambda inner: st.lists(inner)
)


@given(value=values)
def test_a_line_of_json_is_the_value_and_steers_nothing(value: Any) -> None:
    line = json_line(value)
    assert json.loads(line) == value
    assert not set(line) & set(STEERING + "\r\n")


def test_other_text_stays_readable() -> None:
    assert json_line({"answer": "안녕하세요, é"}) == '{"answer": "안녕하세요, é"}'


def test_a_hundred_thousand_problems_become_verdicts_that_one_can_list() -> None:
    found = of_error(ModelError.of([Problem(f"weight {n} has no place") for n in range(100_000)], num_more=5))
    assert len(found) == MAX_LISTED + 1
    assert found[-1].message == f"{100_005 - MAX_LISTED:,} more problems of the same kind"
