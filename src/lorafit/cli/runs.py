"""`lorafit runs`: lists the runs in a folder, newest first, from their files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorafit.cli import options
from lorafit.cli.output import put_json, put_line


def runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder that contains runs.")] = Path(
        "runs"
    ),
    as_json: options.JsonOption = False,
) -> None:
    """List runs: state, steps, loss, held-out loss.

    lorafit runs
    """

    from lorafit.errors import RunError
    from lorafit.observe.console import table
    from lorafit.observe.progress import progress
    from lorafit.observe.run_summary import summarize
    from lorafit.run_dir import find_runs

    if not folder.is_dir():
        raise RunError(
            f"there is no folder `{folder}`",
            hint="`lorafit runs FOLDER` lists the runs in FOLDER; `lorafit train` creates one",
        )
    summaries = []
    with progress("reading runs", quiet=as_json) as advance:
        found = find_runs(folder)
        for done, run in enumerate(found, 1):
            summaries.append((str(run.path), summarize(run)))
            advance(done, len(found))
    if as_json:
        for path, summary in summaries:
            put_json({"run": path, **summary.as_dict()})
    elif summaries:
        rows = [[path, *summary.cells()] for path, summary in summaries]
        table(["run", "model", "state", "step", "loss", "held-out", "base", "learned", "started"], rows)
    else:
        put_line(f"no runs in {folder}", err=True)
