"""`lorafit without`: the run that never had some of its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorafit.cli import options
from lorafit.cli.output import put_json, put_line


def without(
    run: options.RunArgument,
    rows: Annotated[
        str | None,
        typer.Option(
            metavar="17,40-42", help="Numbers of rows, from 1 over all sources.", show_default=False
        ),
    ] = None,
    ids: Annotated[
        list[str] | None,
        typer.Option(
            "--ids", metavar="FILE", help="Ids of rows, as for `data.drop_rows`.", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Run directory; by default RUN-without.", show_default=False),
    ] = None,
    from_start: Annotated[
        bool, typer.Option("--from-start", help="Train from the start where no checkpoint is early enough.")
    ] = False,
    as_json: options.JsonOption = False,
) -> None:
    """Train a run again without some rows, from the last checkpoint that has not seen them: to the same bytes.

    lorafit without runs/mine --rows 17,40 --output runs/cleaner
    """
    from lorafit.observe.console import note, side_by_side
    from lorafit.report.rows_of_run import data_of, numbers_of
    from lorafit.run_dir import RunDirectory
    from lorafit.training.without import both_answers, plan_removal, train_without

    directory = RunDirectory.open(run)
    data = data_of(directory, quiet=as_json)
    removal = plan_removal(directory, data, numbers_of(data, rows, ids or []))
    beginning = removal.beginning(directory, from_start=from_start, option="--from-start")
    if not as_json:
        note(beginning)
    result = train_without(directory, removal, output or Path(f"{directory.path}-without"), quiet=as_json)
    answers = both_answers(directory, RunDirectory.open(result.path))
    if as_json:
        put_json(
            {
                "run": str(result.path),
                "from_step": removal.checkpoint or 0,
                "ids": removal.ids,
                "answers": answers,
            }
        )
        return
    for answer in answers:
        side_by_side(answer["prompt"], answer["before"], answer["after"], titles=("with the rows", "without"))
    put_line(result.path)
