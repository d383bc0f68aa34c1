"""The file of the answers' losses: read as it was written, of the same rows only, and never believed when damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.observe.answer_losses import AnswerLosses, read_answer_losses, write_answer_losses

LOSSES = AnswerLosses(
    np.array([0, 3, 7]), np.array([1.0, 2.5, 0.125]), np.array([2.0, np.nan, 1.0]), np.array([0.5, 9.0, 0.0])
)


def test_it_is_read_as_it_was_written_for_the_same_rows_only(tmp_path: Path) -> None:
    path = tmp_path / "losses.safetensors"
    assert read_answer_losses(path, "ab") is None
    write_answer_losses(path, LOSSES, "ab")
    assert read_answer_losses(path, "cd") is None
    found = read_answer_losses(path, "ab")
    assert found is not None
    for one, other in zip(found, LOSSES, strict=True):
        np.testing.assert_array_equal(one, other)


@given(cut=st.integers(0, 400), at=st.integers(0, 399), byte=st.integers(0, 255))
def test_a_damaged_file_is_none_or_losses_of_one_length(
    tmp_path_factory: pytest.TempPathFactory, cut: int, at: int, byte: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    write_answer_losses(path, LOSSES, "ab")
    content = bytearray(path.read_bytes())
    content[at % len(content)] = byte
    path.write_bytes(content[:cut] if cut < 300 else content)
    found = read_answer_losses(path, "ab")
    assert found is None or {values.shape for values in found} == {found.rows.shape}
