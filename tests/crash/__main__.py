"""The crash campaigns: kill a tiny run, fail its calls or damage its files, resume it, and compare bytes.

    python -m tests.crash [--long] [--only R1 R4 ...] [--jobs N] [--minutes N] [--write docs/reliability.md]

The result of each campaign is written to the results file at once. With --write, the table of all results is written
into that page.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from benchmarks.marks import put_between
from benchmarks.speed import machine
from tests.crash.campaigns import CAMPAIGNS
from tests.crash.server import Servers
from tests.crash.shim import unavailable
from tests.crash.trainer import versions

import lorafit

_SHOWN = 20  # failures whose text is kept


def main() -> int:
    """Run the requested campaigns. Returns 1 if a campaign of lorafit has a failure."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.add_argument(
        "--long", action="store_true", help="the full counts (about an hour on two free cores)"
    )
    parser.add_argument("--only", nargs="*", default=list(CAMPAIGNS), choices=list(CAMPAIGNS), metavar="ID")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at the same time")
    parser.add_argument("--minutes", type=float, default=math.inf, help="time limit of one campaign")
    parser.add_argument("--results", type=Path, default=Path("runs/crash/results.json"))
    parser.add_argument("--again", action="store_true", help="repeat campaigns that are in the results file")
    parser.add_argument("--write", type=Path, help="page for the table")
    options = parser.parse_args()
    if reason := unavailable():
        sys.exit(reason)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(options.results.read_text()) if options.results.exists() else {}
    for name in options.only:
        if name in results and results[name]["long"] == options.long and not options.again:
            print(f"{name}: already in the results file", file=sys.stderr)
        elif reason := CAMPAIGNS[name].missing():
            print(f"{name}: skipped: {reason}", file=sys.stderr)
        else:
            results[name] = run(name, options.long, options.jobs, options.minutes)
            options.results.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    if options.write:
        put_between(options.write, "campaigns", table(results))
    return int(any(results.get(name, {}).get("num_failures") for name in options.only if name != "Trainer"))


def run(name: str, long: bool, jobs: int, minutes: float) -> dict[str, Any]:
    """Run one campaign and print its failures."""
    campaign, started, here = CAMPAIGNS[name], time.monotonic(), machine()
    with (
        tempfile.TemporaryDirectory(prefix="lorafit-crash-") as folder,
        Servers(Path(folder), campaign.module, jobs, 60 * minutes) as servers,
    ):
        tally = campaign.run(Path(folder), servers, long)
    for failure in tally.failures[:_SHOWN]:
        print(f"{name}: {failure}", file=sys.stderr)
    seconds = time.monotonic() - started
    print(f"{name}: {tally.tried:,} tried, {len(tally.failures):,} failed, {seconds:.0f} s", file=sys.stderr)
    return {
        "long": long,
        "cut_short": servers.cut_short,
        "tried": tally.tried,
        "num_failures": len(tally.failures),
        "failures": tally.failures[:_SHOWN],
        "facts": tally.facts,
        "seconds": round(seconds),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": f"{here['cpu']}, {here['cores']} cores, {here['memory_gb']} GB, {platform.system()}",
        "versions": f"lorafit {lorafit.__version__}, torch {torch.__version__}, {versions()}",
    }


def table(results: Mapping[str, Any]) -> str:
    """The results in Markdown: one row per campaign, and the date, machine and versions."""
    lines = [
        "| id | what | target | tried | failed | measured |",
        "| --- | --- | --- | ---: | ---: | --- |",
    ]
    rows = {name: results[name] for name in CAMPAIGNS if name in results}
    for name, result in rows.items():
        facts = [f"{fact}: {number:,}" for fact, number in result["facts"].items()]
        facts.append(
            f"{result['seconds'] / 60:.1f} minutes{', then stopped by the time limit' * result['cut_short']}"
        )
        facts += [] if result["long"] else ["short form"]
        cells = [
            name,
            CAMPAIGNS[name].what,
            CAMPAIGNS[name].target,
            f"{result['tried']:,}",
            f"{result['num_failures']:,}",
            "; ".join(facts),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for what in ("date", "machine", "versions"):
        lines += ["", f"{what.capitalize()}: {'; '.join(sorted({r[what] for r in rows.values()}))}."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
