"""`lorafit show`: rows exactly as the model reads them, with what is trained marked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def show(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [SECTION.KEY=VALUE]...",
            help="A recipe (a YAML file or a shipped name) and overrides, as for `lorafit train`.",
            show_default=False,
        ),
    ] = None,
    row: Annotated[
        int | None,
        typer.Option(min=1, help="A row's number, from 1 over all sources.", show_default=False),
    ] = None,
    rows: Annotated[
        str | None, typer.Option(metavar="FIRST-LAST", help="Several rows: 1-5.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Base model, or a folder with its tokenizer.", show_default=False)
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Rows: file, folder or hub data set; may be repeated.", show_default=False),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe file or shipped name.", show_default=False)
    ] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Every token with its id.")] = False,
    diff: Annotated[
        bool, typer.Option("--diff", help="What differs from the chat template that the model ships.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page instead.", show_default=False)
    ] = None,
) -> None:
    """Show rows as the model reads them: text, what is trained, tokens.

    lorafit show --model TinyLlama/TinyLlama-1.1B-Chat-v1.0 --data alpaca_data.json --row 17
    """
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
    from lorafit.observe.console import has_colours, print_styled, table
    from lorafit.report.row_page import page
    from lorafit.storage.atomic import write_file

    wanted = wanted_rows(row, rows)
    config = config_from_args(settings or [], recipe, flag_overrides(model=model, data=data, output=None))
    renderer, found = rows_of(config, wanted)
    views = [(view_row(renderer, one), shipped(renderer, one) if diff else None) for one in found]
    shown = [(view, difference(view, text) if text is not None else []) for view, text in views]
    if html is not None:
        title = f"Rows as {config.model.name} reads them"
        write_file(html, page(title, shown, ids=ids))
        typer.echo(html)
        return
    for view, lines in shown:
        print_styled([(view.heading, "bold")])
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
