"""`lorafit report`: writes the report of a run again, from its files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorafit.cli import options
from lorafit.cli.output import put_json, put_line


def report(
    run: options.RunArgument,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write this file, not RUN/report.html.", show_default=False),
    ] = None,
    as_json: options.JsonOption = False,
) -> None:
    """Write a run's report: one HTML page for offline use, with curves, answers, ledger and proof.

    lorafit report runs/demo
    """
    from lorafit.observe.run_summary import summarize
    from lorafit.report.page import write_report
    from lorafit.run_dir import RunDirectory

    directory = RunDirectory.open(run)
    path = write_report(directory, output)
    if not as_json:
        put_line(path)
        return
    proof = directory.read_json(directory.proof_file) if directory.proof_file.is_file() else None
    page = {"report": str(path), "bytes": path.stat().st_size}
    put_json({**page, **summarize(directory).as_dict(), "proof": proof})
