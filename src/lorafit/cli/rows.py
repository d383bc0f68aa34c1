"""`lorafit rows`: what became of each row of a run, and the rows to look at."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from lorafit.cli import options
from lorafit.cli.output import load_torch, put_json, put_line


class Sort(Enum):
    """The orders of the list."""

    look = "look"
    loss = "loss"
    fall = "fall"
    row = "row"


def rows(
    run: options.RunArgument,
    sort: Annotated[
        Sort,
        typer.Option(
            help="Order: rows to look at first, highest last loss, least fall of the loss, or number of the row."
        ),
    ] = Sort.look,
    top: Annotated[int, typer.Option(min=0, help="Rows to list; 0 for all.")] = 20,
    second: Annotated[
        bool,
        typer.Option(
            "--second-pass",
            help="Read each answer with its question and without it, by the base: finds more wrong rows. Kept.",
        ),
    ] = False,
    ids: Annotated[
        bool, typer.Option("--ids", help="Print the ids of these rows, for `data.drop_rows`.")
    ] = False,
    as_json: options.JsonOption = False,
) -> None:
    """Show which rows were learned, known before, never learned, forgotten or memorised, and which to look at.

    lorafit rows runs/mine --top 50 --ids > look.txt
    """
    from lorafit.observe.console import table
    from lorafit.report.row_list import counts_of
    from lorafit.report.rows_of_run import data_of, described, rows_of
    from lorafit.run_dir import RunDirectory

    directory = RunDirectory.open(run)
    data = data_of(directory, quiet=as_json or ids)
    if second:
        load_torch()
        from lorafit.evaluate.second_pass import second_pass

        second_pass(directory, data, quiet=as_json or ids)
    found = rows_of(directory, data)
    ranks = {story.number: rank for rank, story in enumerate(found, 1)}
    orders = {
        Sort.look: lambda story: ranks[story.number],
        Sort.loss: lambda story: -story.last,
        Sort.fall: lambda story: story.first - story.last,
        Sort.row: lambda story: story.number,
    }
    listed = described(data, sorted(found, key=orders[sort])[: top or None])
    listed = [{"rank": ranks[row["row"] - 1], **row} for row in listed]
    if ids:
        for row in listed:
            put_line(row["id"])
    elif as_json:
        put_json({"rows": len(found), **counts_of(found)})
        for row in listed:
            put_json(row)
    else:
        put_line(
            f"{len(found):,} rows: " + ", ".join(f"{n:,} {kind}" for kind, n in counts_of(found).items() if n)
        )
        cells = [
            [
                str(row["rank"]),
                row["place"],
                row["kind"],
                f"{row['first']:.2f} -> {row['last']:.2f}",
                row["reason"],
            ]
            for row in listed
        ]
        table(["", "row", "kind", "loss", "reason"], cells)
        put_line("`lorafit show --row N` shows a row; `--ids` prints the list for data.drop_rows", err=True)
        if all(story.asked is None for story in found):
            put_line(
                "`--second-pass` reads each answer without its question too: finds more wrong rows", err=True
            )
