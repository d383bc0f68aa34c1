"""`lorafit runs`: the runs below a folder, newest first, from their files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def runs(
    folder: Annotated[Path, typer.Argument(help="Folder to look in.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """List runs: state, steps, loss, held-out loss."""
    import json

    from lorafit.errors import RunError
    from lorafit.observe.console import table
    from lorafit.observe.run_summary import summarize
    from lorafit.run_dir import find_runs

    if not folder.is_dir():
        raise RunError(
            f"there is no folder `{folder}`",
            hint="`lorafit runs FOLDER` lists the runs below FOLDER; `lorafit train` makes one",
        )
    found = [(run, summarize(run)) for run in find_runs(folder)]
    if as_json:
        for run, summary in found:
            typer.echo(json.dumps({"run": str(run.path), **summary.as_dict()}))
        return
    rows = [[str(run.path), *summary.cells()] for run, summary in found]
    if rows:
        table(["run", "model", "state", "step", "loss", "held-out", "base", "started"], rows)
    else:
        typer.echo(f"no runs below {folder}", err=True)
