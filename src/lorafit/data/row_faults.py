"""One fault in many rows is one problem, with the numbers of the rows."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from lorafit.errors import Problem, Problems

MAX_KINDS = Problems.MAX_KEPT  # of faults that are kept; the rows of others are only counted
_LISTED = 5  # rows that a problem names
_VARIES = re.compile(r"\d[\d,.]*|'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")  # numbers and quoted values


@dataclass(slots=True)
class _Kind:
    """The rows of one file with one kind of fault."""

    first: Problem
    rows: list[int] = field(default_factory=list)
    count: int = 0
    last: int = 0
    is_uniform: bool = True


def kind_of(message: str) -> str:
    """What messages about the same fault of different rows have in common: all but numbers and quoted values."""
    return _VARIES.sub("#", message)


class RowFaults:
    """Collects the faults of rows."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, ...], _Kind] = {}
        self._last = ("", 0)
        self._num_rows = 0
        self.num_more = 0  # faults that are only counted

    def __bool__(self) -> bool:
        return bool(self._kinds)

    def add(self, name: str, row: int, place: str, problem: Problem) -> None:
        """Add a fault of row number `row` (from 1) of the file `name`; `place` is that of the row."""
        self._num_rows += (name, row) != self._last
        self._last = (name, row)
        within = problem.place.removeprefix(place)
        key = (name, *map(kind_of, (problem.message, problem.hint, within)))
        if key not in self._kinds:
            if len(self._kinds) >= MAX_KINDS:
                self.num_more += 1
                return
            self._kinds[key] = _Kind(problem)
        kind = self._kinds[key]
        kind.is_uniform = kind.is_uniform and problem.message == kind.first.message
        if row != kind.last:
            kind.count, kind.last = kind.count + 1, row
            if len(kind.rows) < _LISTED:
                kind.rows.append(row)

    def problems(self, num_rows: int) -> list[Problem]:
        """A problem for each kind of fault; `num_rows` rows were read."""
        problems = [self._problem(key[0], kind) for key, kind in self._kinds.items()]
        if problems and self._num_rows < num_rows:
            hint = f"{problems[-1].hint}; data.bad_rows=drop leaves such rows out"
            problems[-1] = replace(problems[-1], hint=hint.removeprefix("; "))
        return problems

    def _problem(self, name: str, kind: _Kind) -> Problem:
        if kind.count == 1:
            return kind.first
        how = ":" if kind.is_uniform else ", the first:"
        message = f"{kind.count:,} rows{how} {kind.first.message}"
        return Problem(message, rows_of(name, kind.rows, kind.count), kind.first.hint)


def rows_of(name: str, rows: list[int], count: int) -> str:
    """The place of `count` rows of the file `name`, of which `rows` are the first."""
    listed = rows[:_LISTED]
    more = f" and {count - len(listed):,} more" if count > len(listed) else ""
    return f"{name} row{'s' if count > 1 else ''} {', '.join(f'{row:,}' for row in listed)}{more}"
