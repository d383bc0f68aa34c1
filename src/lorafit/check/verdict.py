"""Verdicts: what a check found, a line each, for people, for scripts and for the run directory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from lorafit.errors import ConfigError, DataError, LorafitError, ModelError, Problem
from lorafit.redact import one_line

Outcome = Literal["pass", "warn", "fail"]
OUTCOMES: tuple[Outcome, ...] = ("pass", "warn", "fail")
MAX_LISTED = 1000  # row numbers that a verdict lists, and verdicts that an error becomes


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One thing that was looked at.

    `place` is a file with its rows, or a key; `hint` what to do; both may be empty. `rows` are the numbers of the
    first rows concerned, from 1, over all sources.
    """

    name: str
    verdict: Outcome
    message: str
    place: str = ""
    hint: str = ""
    rows: tuple[int, ...] = ()

    def line(self, width: int = 0) -> str:
        """The verdict in one line, its name filled up to `width`."""
        return f"{self.verdict}  {self.name:<{width}}  {self.text}"

    @property
    def text(self) -> str:
        """Message, place and hint in one sentence."""
        place = f" ({self.place})" if self.place else ""
        hint = f": {self.hint}" if self.hint else ""
        return one_line(f"{self.message}{place}{hint}")

    def as_dict(self) -> dict[str, Any]:
        """As JSON values, fit to be shown and stored."""
        said = {key: one_line(getattr(self, key)) for key in ("message", "place", "hint")}
        return {**asdict(self), **said, "rows": list(self.rows)}


def of_error(error: LorafitError) -> list[CheckResult]:
    """The problems of an error as verdicts that fail."""
    match error:
        case ConfigError():
            name = "settings"
        case DataError():
            name = "rows"
        case ModelError():
            name = "model"
        case _:
            name = "machine"
    listed = error.problems[:MAX_LISTED]
    found = [CheckResult(name, "fail", problem.message, problem.place, problem.hint) for problem in listed]
    if num_more := error.num_more + len(error.problems) - len(listed):
        found.append(CheckResult(name, "fail", f"{num_more:,} more problems"))
    return found


def refuse_failed(verdicts: Iterable[CheckResult]) -> None:
    """Raise DataError with every verdict that fails, if any does."""
    failed = [v for v in verdicts if v.verdict == "fail"]
    if failed:
        last = "`lorafit check` looks at all of it; run.check=warn starts all the same"
        problems = [Problem(f"{v.name}: {v.message}", v.place, v.hint) for v in failed]
        problems[-1] = replace(problems[-1], hint="; ".join(filter(None, [problems[-1].hint, last])))
        raise DataError.of(problems)


def summary(verdicts: Sequence[CheckResult]) -> str:
    """`17 checks: 15 pass, 2 warn`."""
    counts = {outcome: sum(v.verdict == outcome for v in verdicts) for outcome in OUTCOMES}
    return f"{len(verdicts)} checks: " + ", ".join(f"{n} {outcome}" for outcome, n in counts.items() if n)
