"""A few rows exactly as they are trained, and how long all of them are: what a report shows of the data."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorafit.data.encode import Encoded
from lorafit.data.tokenizer import Tokenizer

NUM_BINS = 40
MOST_CHARACTERS = 3000  # of one row


def excerpt(
    training: Encoded, heldout: Encoded, tokenizer: Tokenizer, place: Callable[[int], str]
) -> dict[str, Any]:
    """The lengths of all rows in bins, and some training rows, for rows.json.

    `rows` are the first two, the one of median length and the longest; `place` says where a person finds one. Each
    is its tokens decoded, cut where training begins and ends: what the model reads, not what was meant.
    """
    order = np.argsort(training.lengths, kind="stable")
    chosen = dict.fromkeys([*range(min(2, len(order))), int(order[len(order) // 2]), int(order[-1])])
    return {
        "lengths": histogram(training.lengths, heldout.lengths),
        "rows": [_row(training, index, tokenizer, place(index)) for index in chosen],
    }


def histogram(training: NDArray[np.int32], heldout: NDArray[np.int32]) -> dict[str, list[int]]:
    """Rows in bins of equal width: bin i holds lengths from `edges[i]` to below `edges[i + 1]`."""
    longest = int(max(training.max(initial=0), heldout.max(initial=0)))
    width = -(-(longest + 1) // NUM_BINS)
    edges = np.arange(0, longest + 1 + width, width)
    counts = {"training": training, "heldout": heldout}
    return {
        "edges": edges.tolist(),
        **{name: np.histogram(lengths, edges)[0].tolist() for name, lengths in counts.items()},
    }


def _row(rows: Encoded, index: int, tokenizer: Tokenizer, place: str) -> dict[str, Any]:
    ids, trained = rows.row(index)
    spans, room = [], MOST_CHARACTERS
    for is_trained, group in groupby(zip(ids.tolist(), trained.tolist(), strict=True), lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in group])
        if room > 0:
            spans.append([text if len(text) <= room else text[:room] + " [...]", bool(is_trained)])
        room -= len(text)
    return {"place": place, "tokens": len(ids), "trained": int(trained.sum()), "spans": spans}
