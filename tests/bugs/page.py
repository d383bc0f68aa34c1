"""`python -m tests.bugs.page docs/correctness.md`: puts the table of bugs and probes between the marks of the page."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.bugs.catalogue import BUGS, probes

BEGIN, END = "<!-- bugs: begin -->", "<!-- bugs: end -->"


def table() -> str:
    """Each bug, how it is ruled out, and the names of its probes, as Markdown."""
    lines = ["| # | bug | how it is ruled out | probes in `tests/bugs` |", "| ---: | --- | --- | --- |"]
    for number, bug in BUGS.items():
        names = " ".join(f"`{probe.name}`" for probe in probes() if probe.bug == number)
        lines.append(f"| {number} | {bug.name} | {bug.ruled_out} | {names} |")
    return "\n".join(lines)


def main() -> int:
    """Write the table into the page that is named."""
    page = Path(sys.argv[1])
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
