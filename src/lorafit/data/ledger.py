"""The token ledger: where every row and every token of the data went; the sums must close."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorafit.data.encode import Encoded


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of some rows: training targets, context only, and cut off by truncation."""

    rows: int
    total: int
    trained: int
    masked: int
    truncated: int

    @classmethod
    def of(cls, encoded: Encoded) -> Tokens:
        """The count of `encoded`; the total is the rows' tokens before truncation."""
        truncated = int(encoded.truncated.sum())
        return cls(
            rows=len(encoded),
            total=int((encoded.lengths + encoded.truncated).sum()),
            trained=int(np.count_nonzero(encoded.trained)),
            masked=int(np.count_nonzero(~encoded.trained)),
            truncated=truncated,
        )


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens a row, after truncation, over the rows that are trained and held out."""

    mean: float
    p50: int
    p90: int
    max: int


@dataclass(frozen=True, slots=True)
class Ledger:
    """Every input row in one bucket (trained, held out, dropped) and every token of the kept rows in one.

    `dropped` maps the reason to the numbers of the rows. Trained tokens are targets of next-token prediction.
    """

    num_rows: int
    trained: Tokens
    held_out: Tokens
    dropped: Mapping[str, tuple[int, ...]]
    lengths: Lengths

    @classmethod
    def of(
        cls,
        num_rows: int,
        trained: Encoded,
        held_out: Encoded | None = None,
        dropped: Mapping[str, list[int]] | None = None,
    ) -> Ledger:
        """The account of `num_rows` input rows; `dropped` defaults to the dropped rows of `trained`.

        An AssertionError means that a row is in no bucket or in two: a bug of ours.
        """
        held_out = trained.take(np.array([], dtype=np.int64)) if held_out is None else held_out
        dropped = trained.dropped if dropped is None else dropped
        numbers = [
            *trained.numbers.tolist(),
            *held_out.numbers.tolist(),
            *(n for ns in dropped.values() for n in ns),
        ]
        assert sorted(numbers) == list(range(num_rows)), "a row is in no bucket, or in two"
        lengths = np.concatenate([trained.lengths, held_out.lengths])
        ledger = cls(
            num_rows,
            Tokens.of(trained),
            Tokens.of(held_out),
            {reason: tuple(rows) for reason, rows in dropped.items()},
            _lengths(lengths) if len(lengths) else Lengths(0.0, 0, 0, 0),
        )
        ledger.check()
        return ledger

    @property
    def num_dropped(self) -> int:
        """Rows that were dropped, for whatever reason."""
        return sum(len(rows) for rows in self.dropped.values())

    @property
    def trained_share(self) -> float:
        """Which part of the tokens of the trained rows are targets."""
        return self.trained.trained / self.trained.total if self.trained.total else 0.0

    def check(self) -> None:
        """Asserts that the sums close."""
        assert self.trained.rows + self.held_out.rows + self.num_dropped == self.num_rows
        for tokens in (self.trained, self.held_out):
            assert tokens.trained + tokens.masked + tokens.truncated == tokens.total

    def lines(self) -> list[str]:
        """The account for a person."""
        shares = [
            f"{self.trained.rows:,} trained",
            f"{self.held_out.rows:,} held out",
            f"{self.num_dropped:,} dropped",
        ]
        lines = [f"rows    {self.num_rows:,} = {' + '.join(shares)}"]
        lines += [f"        {len(rows):,} dropped: {reason}" for reason, rows in self.dropped.items()]
        lines.append(f"tokens  {_account(self.trained)}")
        if self.held_out.rows:
            lines.append(f"        held out: {_account(self.held_out)}")
        stats = self.lengths
        lines.append(
            f"length  mean {stats.mean:.0f}, half up to {stats.p50:,}, "
            f"90% up to {stats.p90:,}, max {stats.max:,}"
        )
        return lines

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            **dataclasses.asdict(self),
            "dropped": {reason: list(rows) for reason, rows in self.dropped.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Ledger:
        """The inverse of `to_json`."""
        return cls(
            value["num_rows"],
            Tokens(**value["trained"]),
            Tokens(**value["held_out"]),
            {reason: tuple(rows) for reason, rows in value["dropped"].items()},
            Lengths(**value["lengths"]),
        )


def _lengths(lengths: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Lengths:
    p50, p90 = np.percentile(lengths, [50, 90], method="higher")
    return Lengths(float(lengths.mean()), int(p50), int(p90), int(lengths.max()))


def _account(tokens: Tokens) -> str:
    def part(count: int, name: str) -> str:
        return f"{count:,} {name} ({count / tokens.total:.1%})" if tokens.total else f"{count:,} {name}"

    parts = [
        part(tokens.trained, "trained"),
        part(tokens.masked, "masked"),
        part(tokens.truncated, "truncated"),
    ]
    return f"{tokens.total:,} = {' + '.join(parts)}"
