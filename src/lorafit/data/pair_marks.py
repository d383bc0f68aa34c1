"""The marks of the tokens of a preference: which answer each belongs to, and whether it is supervised.

The row of a preference holds its prompt once, then the chosen answer, then the rejected one; a row of one answer that
is marked as good or bad has only that. So a row is counted as it is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

SUPERVISED, CHOSEN, REJECTED = 1, 2, 4  # bits of a mark; a token of the prompt has neither of the last two
OF_PROMPT, OF_ANSWER = 1, 2  # supervised tokens of a document

Marked = NDArray[np.uint8]


def marks_of(trained: NDArray[Any]) -> Marked:
    """`trained` of the row of a preference."""
    assert trained.dtype == np.uint8
    return trained


def documents_of(
    ids: NDArray[Any], trained: NDArray[Any]
) -> Iterator[tuple[bool, NDArray[Any], NDArray[Any]]]:
    """The documents of a row as (whether it is the rejected answer, ids, what is supervised).

    A row that is no preference is one document, as it is. Of a preference each answer is a document with its prompt,
    whose supervised tokens are OF_PROMPT or OF_ANSWER. A supervised prompt counts with the chosen answer.
    """
    if trained.dtype != np.uint8:
        yield False, ids, trained
        return
    for side, other in (CHOSEN, REJECTED), (REJECTED, CHOSEN):
        if not (trained & side).any():
            continue
        kept = (trained & other) == 0
        marks = trained[kept]
        supervised = (marks & SUPERVISED) * np.where(marks & side, OF_ANSWER, OF_PROMPT * (side == CHOSEN))
        yield side == REJECTED, ids[kept], supervised.astype(np.uint8)


def preferred(ids: NDArray[Any], marks: Marked) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """The row of the chosen answer, or of the only one: its ids, and which are supervised."""
    _, text, supervised = next(documents_of(ids, marks))
    return text, supervised > 0
