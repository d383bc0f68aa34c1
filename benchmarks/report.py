"""The tables of a run of speed.py, from its JSON record."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.programs import Outcome, Step
from benchmarks.targets import TARGETS, Results


def results_of(record: Mapping[str, Any]) -> Results:
    """The raw JSON record of a run as figures."""
    outcomes = [
        Outcome(**{**fields, "steps": [Step(**step) for step in fields["steps"]]})
        for fields in record["outcomes"]
    ]
    return Results(record["model"]["config"], outcomes, record["limits"])


def report(record: Mapping[str, Any]) -> str:
    """The record as Markdown: the machine, the targets, the programs and the limits."""
    results = results_of(record)
    programs = list(dict.fromkeys(outcome.program for outcome in results.outcomes))
    head = [
        "program",
        "steps",
        "s per step",
        "first step",
        "rows/s",
        "tokens/s",
        "of bf16 product",
        "peak GB",
        "start",
    ]
    figures = [
        [
            program,
            str(len(results.steps(program))),
            _number(results.seconds(program)),
            _number(results.warm_up_seconds(program)),
            _number(results.rows_per_second(program), 3),
            _number(results.tokens_per_second(program), 1),
            _number(results.share_of_product(program)),
            _number(results.peak_gb(program)),
            _number(results.first_step_seconds(program), 1),
        ]
        for program in programs
    ]
    rates = [
        [
            name,
            *(_number(results.product_rate(name, way), 0) for way in ("forward", "input_gradient", "both")),
        ]
        for name in (results.limits[0] if results.limits else {})
    ]
    machine, layers = record["machine"], results.config["num_hidden_layers"]
    measured_on = (
        f"{record['date']}, {machine['cpu']}, {machine['threads']} threads, {machine['memory_gb']} GB; "
        f"{layers} layers; "
        + ", ".join(f"{name} {number}" for name, number in record["versions"].items())
        + f". `{record['command']}`"
    )
    parts = [
        textwrap.fill(measured_on, 110, break_long_words=False, break_on_hyphens=False),
        table(["target", "goal", "measured", ""], [target.row(results) for target in TARGETS]),
        table(head, figures),
        table(["products, GFLOP/s", "forward", "input gradient", "both"], rates),
    ]
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns: the first to the left, the others to the right."""
    widths = [max(3, *(len(row[column]) for row in [head, *rows])) for column in range(len(head))]
    lines = []
    for row in [head, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])], *rows]:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
