"""`python -m tests.bugs.page docs/correctness.md`: writes the table of bugs and probes into the page."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.marks import put_between
from tests.bugs.catalogue import BUGS, probes


def table() -> str:
    """Each bug, how it is ruled out, and the names of its probes, as Markdown."""
    lines = ["| # | bug | how it is ruled out | probes in `tests/bugs` |", "| ---: | --- | --- | --- |"]
    for number, bug in BUGS.items():
        names = " ".join(f"`{probe.name}`" for probe in probes() if probe.bug == number)
        lines.append(f"| {number} | {bug.name} | {bug.ruled_out} | {names} |")
    return "\n".join(lines)


def main() -> int:
    """Write the table between the marks of the page on the command line."""
    put_between(Path(sys.argv[1]), "bugs", table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
