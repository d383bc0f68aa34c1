"""`lorafit plan`: what a run would take, and whether it fits, without starting it."""

from __future__ import annotations

from typing import Annotated

import typer


def plan(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [SECTION.KEY=VALUE]...",
            help="A recipe (a YAML file or a shipped name) and overrides, as for `lorafit train`.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Base model: hub id or folder.", show_default=False)
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Rows: file, folder or hub data set; may be repeated.", show_default=False),
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="Taken as `lorafit train` takes it; not made.", show_default=False)
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe file or shipped name.", show_default=False)
    ] = None,
    auto: Annotated[
        bool,
        typer.Option("--auto", help="Where memory is short, pick settings that fit (run.too_large=auto)."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object; bytes and seconds.")] = False,
) -> None:
    """Say what a run would take: tokens, steps, memory and time, measured on its heaviest pass.

    lorafit plan --model TinyLlama/TinyLlama-1.1B-Chat-v1.0 --data alpaca_data.json
    """
    import json

    from lorafit.config.load import config_from_args, flag_overrides

    flags = flag_overrides(model=model, data=data, output=output, auto=auto)
    config = config_from_args(settings or [], recipe, flags)

    from lorafit.observe.console import table
    from lorafit.plan.planner import plan_run
    from lorafit.plan.table import table_rows

    made = plan_run(config)
    if as_json:
        typer.echo(json.dumps(made.as_dict()))
        return
    if made.picked:
        typer.echo(made.picked, err=True)
    table(["plan", "", ""], table_rows(made))
