"""Errors as results of checks, results as an error, and their summary in one line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import get_args

from lorafit.errors import (
    MAX_LISTED,
    CheckResult,
    ConfigError,
    DataError,
    LorafitError,
    ModelError,
    Outcome,
    Problem,
)


def of_error(error: LorafitError) -> list[CheckResult]:
    """The problems of an error as results that fail."""
    name = {ConfigError: "settings", DataError: "rows", ModelError: "model"}.get(type(error), "machine")
    listed = error.problems[:MAX_LISTED]
    results = [CheckResult(name, "fail", problem.message, problem.place, problem.hint) for problem in listed]
    if num_more := error.num_more + len(error.problems) - len(listed):
        results.append(CheckResult(name, "fail", f"{num_more:,} more problems"))
    return results


def refuse_failed(verdicts: Iterable[CheckResult]) -> None:
    """Raise DataError with every result that fails, if any does."""
    failed = [v for v in verdicts if v.verdict == "fail"]
    if failed:
        last = "`lorafit check` lists all results; run.check=warn starts the run anyway"
        problems = [Problem(f"{v.name}: {v.message}", v.place, v.hint) for v in failed]
        problems[-1] = replace(problems[-1], hint="; ".join(filter(None, [problems[-1].hint, last])))
        raise DataError.of(problems)


def summary(verdicts: Sequence[CheckResult]) -> str:
    """`17 checks: 15 pass, 2 warn`."""
    counts = {outcome: sum(v.verdict == outcome for v in verdicts) for outcome in get_args(Outcome)}
    return f"{len(verdicts)} check{'s' if len(verdicts) != 1 else ''}: " + ", ".join(
        f"{n} {outcome}" for outcome, n in counts.items() if n
    )
