"""`lorafit report`: make the report of a run anew, from its files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[str, typer.Argument(help="Run directory.")],
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the page here, not to RUN/report.html.", show_default=False),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object: the page's path and what the run came to.")
    ] = False,
) -> None:
    """Write a run's report: one HTML page that opens offline, with curves, answers, ledger and proof."""
    from lorafit.observe.run_summary import summarize
    from lorafit.redact import json_line
    from lorafit.report.page import write_report
    from lorafit.run_dir import RunDirectory

    directory = RunDirectory.open(run)
    path = write_report(directory, output)
    if not as_json:
        typer.echo(path)
        return
    proof = directory.read_json(directory.proof_file) if directory.proof_file.is_file() else None
    found = {
        "report": str(path),
        "bytes": path.stat().st_size,
        **summarize(directory).as_dict(),
        "proof": proof,
    }
    typer.echo(json_line(found))
