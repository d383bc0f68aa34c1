"""`lorafit models`: the models that people ask for, what is supported, and what each needs on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from lorafit.cli import options
from lorafit.cli.output import put_json, put_text


def models(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A model, such as SmolLM3-3B.", show_default=False)
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page of the table.")] = False,
    as_json: options.JsonOption = False,
) -> None:
    """List the models, or explain one: whether it fits here, its memory, and the time of 1,000 rows.

    lorafit models SmolLM2-135M-Instruct
    """
    from lorafit.observe.console import table
    from lorafit.plan import model_table
    from lorafit.plan.known_models import KNOWN, find_model

    if markdown:
        put_text(model_table.markdown(), end="")
        return
    headers = [*model_table.HEADERS, "fits", "memory", "1,000 rows"]
    chosen = KNOWN if name is None else [find_model(name)]
    rows = [
        [*row, *need]
        for row, need in zip(model_table.table_rows(chosen), model_table.here(chosen), strict=True)
    ]
    if as_json:
        for row in rows:
            put_json(dict(zip(headers, row, strict=True)))
    elif name is None:
        table(headers, rows)
    else:
        table([chosen[0].name, ""], [list(pair) for pair in zip(headers, rows[0], strict=True)])
