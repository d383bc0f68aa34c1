"""`python -m tests.bugs`: each of the 32 bugs, how it is ruled out, and its probes without and with the bug put in."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tests.bugs.catalogue import BUGS, Outcome, Probe, probes, verdict
from tests.bugs.lab import Plant


def main() -> int:
    """Print the table; 1 if a probe fails on lorafit as it is, or passes with a bug put in."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bugs", nargs="*", type=int, help="numbers of the bugs to try; all without any")
    parser.add_argument("--reasons", action="store_true", help="show what each probe says of each bug put in")
    wanted = parser.parse_args()
    table = Table(title="32 bugs of LoRA fine-tuning tools, put into lorafit", show_lines=False)
    for name in ("#", "bug", "probe", "as it is", "with the bug"):
        table.add_column(name, justify="right" if name == "#" else "left", overflow="fold")
    wrong = 0
    for probe in probes():
        if wanted.bugs and probe.bug not in wanted.bugs:
            continue
        clean = _tried(probe, None)
        planted = [_tried(probe, plant) for plant in probe.plants]
        wrong += (not clean.passed) + sum(outcome.passed for outcome in planted)
        if wanted.reasons:
            for plant, outcome in zip(probe.plants, planted, strict=True):
                print(f"{probe.bug} {probe.name}: {plant}\n    {outcome.message or 'NOT SEEN'}", flush=True)
        seen = sum(not outcome.passed for outcome in planted)
        table.add_row(
            str(probe.bug),
            BUGS[probe.bug].name,
            probe.name,
            "passes" if clean.passed else f"FAILS: {clean.message}",
            f"fails, {seen} of {len(planted)}"
            if seen == len(planted)
            else f"NOT SEEN, {seen} of {len(planted)}",
        )
        print(f"{probe.bug:2} {probe.name}", file=sys.stderr, flush=True)
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    return int(wrong > 0)


def _tried(probe: Probe, plant: Plant | None) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        return verdict(probe, plant, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
