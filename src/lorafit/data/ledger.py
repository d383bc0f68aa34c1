"""The token ledger: the account of every row and every token of the data. The sums must close."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

if TYPE_CHECKING:  # a page that shows a ledger renders no rows
    from lorafit.data.token_dataset import RowFacts, TokenDataset


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of some rows: training targets, context only, and cut by truncation."""

    rows: int
    total: int
    trained: int
    masked: int
    truncated: int
    pieces: int = 0  # of the rows that were split

    @classmethod
    def of(cls, encoded: TokenDataset) -> Tokens:
        """The count of `encoded`; the total is the rows' tokens before truncation."""
        kept, trained = int(encoded.lengths.sum(dtype=np.int64)), int(encoded.targets.sum(dtype=np.int64))
        truncated = int(encoded.truncated.sum(dtype=np.int64))
        _, pieces = np.unique(encoded.numbers, return_counts=True)
        split = int(pieces[pieces > 1].sum())
        return cls(len(pieces), kept + truncated, trained, kept - trained, truncated, split)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens per row, after truncation, of the rows that are trained and held out."""

    mean: float
    p50: int
    p90: int
    max: int

    def __str__(self) -> str:
        return f"mean {self.mean:.0f}, half up to {self.p50:,}, 90% up to {self.p90:,}, max {self.max:,}"


@dataclass(frozen=True, slots=True)
class DroppedRows:
    """How many rows were dropped for one reason, and the numbers of the first of them."""

    MAX_LISTED: ClassVar = 1000

    rows: int
    first: tuple[int, ...]

    @classmethod
    def of(cls, numbers: NDArray[np.int64]) -> DroppedRows:
        """The count of `numbers`."""
        return cls(len(numbers), tuple(numbers[: cls.MAX_LISTED].tolist()))


@dataclass(frozen=True, slots=True)
class Ledger:
    """Every input row in one bucket (trained, held out, dropped) and every token of the kept rows in one.

    `dropped` maps the reason to the rows. Trained tokens are targets of next-token prediction. `weights` counts the
    answers by the weight of their loss, `aliases` the rows with a key that is read as another one, `unused` the rows
    with a key that is not used. `held_out_rows` are the numbers of the first held-out rows, from 0. `pairs` are the
    counts of preferences: see `RowFacts.count_pair`; the tokens of one are its prompt once and its answers.
    """

    num_rows: int
    trained: Tokens
    held_out: Tokens
    dropped: Mapping[str, DroppedRows]
    lengths: Lengths
    weights: Mapping[str, int] = field(default_factory=dict)
    aliases: Mapping[str, int] = field(default_factory=dict)
    unused: Mapping[str, int] = field(default_factory=dict)
    held_out_rows: tuple[int, ...] = ()
    pairs: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        num_rows: int,
        trained: TokenDataset,
        held_out: TokenDataset | None = None,
        dropped: Mapping[str, NDArray[np.int64]] | None = None,
        row_facts: RowFacts | None = None,
    ) -> Ledger:
        """The account of `num_rows` input rows; `dropped` defaults to the dropped rows of `trained`.

        `row_facts` are the weights and keys of the rows.

        An AssertionError means that a row is in no bucket or in two: a bug of ours.
        """
        from lorafit.data.token_dataset import RowFacts

        held_out = trained.take(np.array([], dtype=np.int64)) if held_out is None else held_out
        dropped = trained.dropped if dropped is None else dropped
        parts = [np.unique(trained.numbers), np.unique(held_out.numbers), *dropped.values()]
        seen = np.zeros(num_rows, dtype=np.bool_)
        for numbers in parts:
            seen[numbers] = True
        assert seen.all() and sum(map(len, parts)) == num_rows, "a row is in no bucket, or in two"  # noqa: PT018
        lengths = np.concatenate([trained.lengths, held_out.lengths])
        facts = row_facts or RowFacts()
        ledger = cls(
            num_rows,
            Tokens.of(trained),
            Tokens.of(held_out),
            {reason: DroppedRows.of(numbers) for reason, numbers in dropped.items()},
            _lengths(lengths) if len(lengths) else Lengths(0.0, 0, 0, 0),
            weights=facts.weights,
            aliases=facts.aliases,
            unused=facts.unused,
            pairs=facts.pairs,
            held_out_rows=tuple(np.unique(held_out.numbers)[: DroppedRows.MAX_LISTED].tolist()),
        )
        ledger.check()
        return ledger

    @property
    def num_dropped(self) -> int:
        """Rows that were dropped, for any reason."""
        return sum(rows.rows for rows in self.dropped.values())

    @property
    def trained_share(self) -> float:
        """The share of targets in the tokens of the trained rows."""
        return self.trained.trained / self.trained.total if self.trained.total else 0.0

    def check(self) -> None:
        """Asserts that the sums close."""
        assert self.trained.rows + self.held_out.rows + self.num_dropped == self.num_rows
        for tokens in (self.trained, self.held_out):
            assert tokens.trained + tokens.masked + tokens.truncated == tokens.total

    def lines(self) -> list[str]:
        """The account for the user."""
        lines = [f"rows    {self.row_sum}"]
        lines += [f"        {rows.rows:,} dropped: {reason}" for reason, rows in self.dropped.items()]
        lines += [f"        {line}" for line in self.piece_lines()]
        lines.append(f"tokens  {_account(self.trained)}")
        lines += [f"        {line}" for line in self.heldout_lines()]
        if 0 < self.held_out.rows <= _FEW_ROWS:
            lines.append(f"        held-out rows: {', '.join(str(row + 1) for row in self.held_out_rows)}")
        lines.append(f"length  {self.lengths}")
        lines += [f"pairs   {line}" for line in self.pair_lines()]
        return [*lines, *(f"loss    {line}" for line in self.loss_lines()), *self.key_lines()]

    @property
    def row_sum(self) -> str:
        """`60 = 54 trained + 6 held out + 0 dropped`."""
        trained, held_out = self.trained.rows, self.held_out.rows
        return (
            f"{self.num_rows:,} = {trained:,} trained + {held_out:,} held out + {self.num_dropped:,} dropped"
        )

    @property
    def sums(self) -> str:
        """The account in one line, for `lorafit check`."""
        parts = [f"rows {self.row_sum}", f"tokens {_account(self.trained)}"]
        return "; ".join([*parts, *self.heldout_lines(), *self.piece_lines()])

    def heldout_lines(self) -> list[str]:
        """The tokens of the held-out rows, if there are any."""
        return [f"held out: {_account(self.held_out)}"] if self.held_out.rows else []

    def piece_lines(self) -> list[str]:
        """How many pieces the texts that were split have, if any was."""
        pieces = self.trained.pieces + self.held_out.pieces
        return [f"longer texts are split into {pieces:,} pieces"] if pieces else []

    def pair_lines(self) -> list[str]:
        """Preferences, and what their tokens would be with a prompt for each answer, if there are any."""
        if not self.pairs:
            return []
        rows = self.pairs.get("pairs", 0) + self.pairs.get("single", 0)
        single = f", {self.pairs['single']:,} of one answer" if "single" in self.pairs else ""
        computed, separate = self.pairs["computed"], self.pairs["separate"]
        return [
            f"{rows:,} preferences{single}: {computed / rows:,.0f} tokens computed per pair, {separate / rows:,.0f} "
            "with a prompt for each answer"
        ]

    def loss_lines(self) -> list[str]:
        """The answers by the weight of their loss, if it is not always 1."""
        if set(self.weights) <= {"1"}:
            return []
        counts = sorted(self.weights.items(), key=lambda item: float(item[0]))
        parts = " + ".join(f"{count:,} of weight {weight}" for weight, count in counts)
        return [f"{sum(self.weights.values()):,} answers = {parts}"]

    def key_lines(self) -> list[str]:
        """The keys of rows that are read as others, and those that are not used."""

        def listed(keys: Mapping[str, int]) -> str:
            return ", ".join(
                f"{key} ({count:,} row{'' if count == 1 else 's'})" for key, count in keys.items()
            )

        parts = (("keys read", self.aliases), ("keys not used", self.unused))
        return [f"{name}: {listed(keys)}" for name, keys in parts if keys]

    def to_json(self) -> dict[str, Any]:
        """As JSON values; without `pairs` where there are none."""
        values: dict[str, Any] = _LEDGER.dump_python(self, mode="json")
        if not self.pairs:
            del values["pairs"]
        return values

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Ledger:
        """The inverse of `to_json`. Raises ValueError for values of another shape."""
        return _LEDGER.validate_python(value)


_LEDGER = TypeAdapter(Ledger)
_FEW_ROWS = 20  # that are named one by one on a terminal; ledger.json has up to DroppedRows.MAX_LISTED


def _lengths(lengths: NDArray[np.int32]) -> Lengths:
    p50, p90 = np.percentile(lengths, [50, 90], method="higher")
    return Lengths(float(lengths.mean()), int(p50), int(p90), int(lengths.max()))


def _account(tokens: Tokens) -> str:
    def part(count: int, name: str) -> str:
        return f"{count:,} {name} ({count / tokens.total:.1%})" if tokens.total else f"{count:,} {name}"

    parts = " + ".join(part(getattr(tokens, name), name) for name in ("trained", "masked", "truncated"))
    return f"{tokens.total:,} = {parts}"
