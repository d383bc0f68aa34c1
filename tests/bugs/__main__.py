"""`python -m tests.bugs`: runs the probes of the 32 bugs, without and with the bug."""

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
    """Print the table. Returns 1 if a probe fails on unchanged lorafit, or passes with a bug."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bugs", nargs="*", type=int, help="numbers of bugs (default: all)")
    parser.add_argument("--reasons", action="store_true", help="show the message of each probe for each bug")
    arguments = parser.parse_args()
    table = Table(title="32 bugs of LoRA fine-tuning tools, inserted into lorafit", show_lines=False)
    for name in ("#", "bug", "probe", "unchanged", "with the bug"):
        table.add_column(name, justify="right" if name == "#" else "left", overflow="fold")
    wrong = 0
    for probe in probes():
        if arguments.bugs and probe.bug not in arguments.bugs:
            continue
        clean = _tried(probe, None)
        planted = [_tried(probe, plant) for plant in probe.plants]
        wrong += (not clean.passed) + sum(outcome.passed for outcome in planted)
        if arguments.reasons:
            for plant, outcome in zip(probe.plants, planted, strict=True):
                print(
                    f"{probe.bug} {probe.name}: {plant}\n    {outcome.message or 'NOT DETECTED'}", flush=True
                )
        detected = sum(not outcome.passed for outcome in planted)
        table.add_row(
            str(probe.bug),
            BUGS[probe.bug].name,
            probe.name,
            "passes" if clean.passed else f"FAILS: {clean.message}",
            f"fails, {detected} of {len(planted)}"
            if detected == len(planted)
            else f"NOT DETECTED, {detected} of {len(planted)}",
        )
        print(f"{probe.bug:2} {probe.name}", file=sys.stderr, flush=True)
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    return int(wrong > 0)


def _tried(probe: Probe, plant: Plant | None) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        return verdict(probe, plant, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
