"""`lorafit plan`: predicts tokens, steps, memory and time of a run, without starting it."""

from __future__ import annotations

import typer

from lorafit.cli import options


def plan(
    settings: options.Overrides = None,
    model: options.ModelOption = None,
    data: options.DataOption = None,
    output: options.OutputOption = None,
    recipe: options.RecipeOption = None,
    auto: options.AutoOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Predict a run: tokens, steps, memory and time, from a measurement of its largest pass.

    lorafit plan --model TinyLlama/TinyLlama-1.1B-Chat-v1.0 --data alpaca_data.json
    """

    from lorafit.config.load import config_from_args, flag_overrides

    flags = flag_overrides(model=model, data=data, output=output, auto=auto)
    config = config_from_args(settings or [], recipe, flags)

    from lorafit.observe.console import table
    from lorafit.plan.planner import plan_run
    from lorafit.plan.table import table_rows
    from lorafit.redact import safe_json_line

    prediction = plan_run(config)
    if as_json:
        typer.echo(safe_json_line(prediction.as_dict()))
        return
    if prediction.picked:
        typer.echo(prediction.picked, err=True)
    table(["plan", "", ""], table_rows(prediction))
