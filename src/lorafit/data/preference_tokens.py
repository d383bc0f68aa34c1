"""Preferences as ids: each answer is rendered as a row of its own, and both become one row with their prompt once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorafit.data.content import Content, Preference
from lorafit.data.formats import Row
from lorafit.data.pair_marks import CHOSEN, REJECTED, SUPERVISED
from lorafit.data.prompt import Dropped, Rendered, Renderer
from lorafit.errors import Problem

Outcome = Rendered | Dropped | Problem


@dataclass(frozen=True, slots=True)
class MarkedRow(Rendered):
    """A preference as ids: the prompt, then the answers. `trained` are the marks of data/pair_marks.py.

    `prompt` is the number of ids before the answers, `answers` the ids of each answer.
    """

    prompt: int = 0
    answers: tuple[int, ...] = ()

    @property
    def longest(self) -> int:
        return self.prompt + max(self.answers)

    def first(self, length: int) -> Rendered:
        ids, marks = self.ids[: min(length, self.prompt)], list(self.trained[: min(length, self.prompt)])
        kept, start = [], self.prompt
        for size in self.answers:
            kept.append(max(0, min(size, length - self.prompt)))
            ids += self.ids[start : start + kept[-1]]
            marks += self.trained[start : start + kept[-1]]
            start += size
        return MarkedRow(ids, marks, None, min(length, self.prompt), tuple(kept))

    @property
    def is_supervised(self) -> bool:
        sides = {mark & ~SUPERVISED for mark in self.trained if mark & SUPERVISED} - {0}
        return len(sides) == len(self.answers)


def render(renderer: Renderer, rows: Sequence[Row]) -> list[Outcome]:
    """`Renderer.render_batch`, where a preference becomes a MarkedRow.

    With `data.train_on=all` its prompt is supervised too.
    """
    if not any(isinstance(row.content, Preference) for row in rows):
        return list(renderer.render_batch(rows))
    whole = renderer.contract.train_on == "all"
    if whole:  # the masks of answers show where the prompt ends
        renderer = Renderer(replace(renderer.contract, train_on="response"), renderer.tokenizer)
    alone = [
        replace(row, content=content, place=f"{row.place}, {name}")
        for row in rows
        for name, content in _sides(row.content)
    ]
    rendered = iter(renderer.render_batch(alone))
    return [_joined({name: next(rendered) for name, _ in _sides(row.content)}, whole) for row in rows]


def _sides(content: Content) -> list[tuple[str, Content]]:
    assert isinstance(content, Preference)
    both = (("chosen", content.chosen), ("rejected", content.rejected))
    return [(name, side) for name, side in both if side is not None]


def _joined(sides: dict[str, Outcome], whole: bool) -> Outcome:
    for name, outcome in sides.items():
        if isinstance(outcome, Problem):
            return outcome
        if isinstance(outcome, Dropped):
            return Dropped(f"{outcome.reason} (`{name}`)")
    rows = [outcome for outcome in sides.values() if isinstance(outcome, Rendered)]
    prompt = min(row.trained.index(True) for row in rows)
    if len(rows) == 2:
        one, other = (row.ids[:prompt] for row in rows)
        prompt = next((at for at in range(prompt) if one[at] != other[at]), prompt)
    marks: list[Any] = [SUPERVISED * (whole and at > 0) for at in range(prompt)]
    ids = rows[0].ids[:prompt]
    for name, row in zip(sides, rows, strict=True):
        side = CHOSEN if name == "chosen" else REJECTED
        ids += row.ids[prompt:]
        marks += [side | int(trained) for trained in row.trained[prompt:]]
    return MarkedRow(ids, marks, None, prompt, tuple(len(row.ids) - prompt for row in rows))
