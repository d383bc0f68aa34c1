"""Rows of a run as texts to score: the held-out ones, or trained ones if none are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lorafit.data.build import build_data
from lorafit.errors import LorafitError
from lorafit.export.run_source import RunSource
from lorafit.storage.atomic import MANIFEST, read_facts

_MOST_ROWS, _LONGEST, _MOST_SCORED = 8, 256, 128  # rows, tokens per row, scored tokens of all rows
_CALIBRATED = 512  # tokens of training rows


@dataclass(frozen=True, slots=True)
class Text:
    """Ids, and the positions of those to score; none of them is 0."""

    ids: list[int]
    positions: Sequence[int]


@dataclass(frozen=True, slots=True)
class RowTexts:
    """Texts, and what they are: `held-out rows` or `trained rows`; without texts, why there are none."""

    texts: Sequence[Text]
    name: str

    @property
    def num_scored(self) -> int:
        """How many tokens are scored."""
        return sum(len(text.positions) for text in self.texts)


def rows_of(source: RunSource, longest: int) -> tuple[RowTexts, Sequence[Text]]:
    """(beginnings of a few rows to measure on, training rows to calibrate with), each of at most `longest` tokens.

    Both are empty if the rows cannot be read, or have changed since the training.
    """
    if source.config is None:
        return RowTexts((), "the adapter is not from a run of lorafit"), ()
    try:
        data = build_data(source.config, source.base, source.arch, quiet=False)
    except LorafitError as error:
        return RowTexts((), f"the rows cannot be read ({error.problems[0].message})"), ()
    facts = read_facts(source.adapter) if (source.adapter / MANIFEST).is_file() else {}
    if facts.get("data", data.digest()) != data.digest():
        return RowTexts((), "the rows have changed since the training"), ()
    longest = min(_LONGEST, longest)
    calibration, left = [], _CALIBRATED
    for index in range(len(data.training)):
        if left <= 0:
            break
        ids = data.training.row(index)[0][:longest].tolist()
        calibration.append(Text(ids, ()))
        left -= len(ids)
    texts = []
    rows = data.fixed_rows(_MOST_ROWS)
    for ids, trained in rows:
        some = ids[:longest].tolist()
        positions = (np.flatnonzero(trained[1 : len(some)]) + 1)[: max(8, _MOST_SCORED // len(rows))].tolist()
        if positions:
            texts.append(Text(some[: positions[-1] + 1], positions))
    if not texts:
        return RowTexts((), "every answer begins too late in its row"), calibration
    is_held_out = len(data.heldout) > 0 and not data.was_refit(facts)
    return RowTexts(texts, "held-out rows" if is_held_out else "trained rows"), calibration
