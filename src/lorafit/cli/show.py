"""`lorafit show`: shows rows exactly as the model reads them, with the supervised tokens marked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorafit.cli import options
from lorafit.cli.output import put_line


def show(
    settings: options.Overrides = None,
    row: Annotated[
        int | None,
        typer.Option(min=1, help="Number of a row, from 1 over all sources.", show_default=False),
    ] = None,
    rows: Annotated[
        str | None, typer.Option(metavar="FIRST-LAST", help="Several rows: 1-5.", show_default=False)
    ] = None,
    model: options.ModelOption = None,
    data: options.DataOption = None,
    recipe: options.RecipeOption = None,
    ids: Annotated[bool, typer.Option("--ids", help="Show all tokens with their ids.")] = False,
    diff: Annotated[
        bool, typer.Option("--diff", help="Show the differences from the model's own chat template.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write an HTML page to FILE instead.", show_default=False),
    ] = None,
) -> None:
    """Show rows as the model reads them: text, supervised part, tokens.

    lorafit show --model TinyLlama/TinyLlama-1.1B-Chat-v1.0 --data alpaca_data.json --row 17
    """
    import sys

    from lorafit.config.load import config_from_args, flag_overrides
    from lorafit.data.row_preview import (
        difference,
        marked,
        rows_of,
        shipped,
        styled,
        token_lines,
        view_row,
        wanted_rows,
    )
    from lorafit.observe.console import console_of, has_colours, print_line, print_styled, table
    from lorafit.report.escape import rows_page
    from lorafit.storage.atomic import write_file

    numbers = wanted_rows(row, rows)
    config = config_from_args(settings or [], recipe, flag_overrides(model=model, data=data, output=None))
    renderer, selected = rows_of(config, numbers)
    views = [(view_row(renderer, one), shipped(renderer, one) if diff else None) for one in selected]
    with_diff = [(view, difference(view, text) if text is not None else []) for view, text in views]
    if html is not None:
        title = f"Rows as {config.model.name} reads them"
        write_file(html, rows_page(title, with_diff, ids=ids))
        put_line(html)
        return
    for view, lines in with_diff:
        print_line(console_of(sys.stdout), view.heading, "bold")
        if ids:
            table(["", "id", "", "text"], token_lines(view))
        elif has_colours():
            print_styled(styled(view))
        else:
            print_styled([(marked(view), "")])
        if diff:
            print_styled([("from the model's chat template (-) to this row (+)", "bold")])
            for sign, line in lines:
                print_styled([(f"{sign} {line}", {"-": "red", "+": "green"}.get(sign, ""))])
        print_styled([("", "")])
