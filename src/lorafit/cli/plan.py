"""`lorafit plan`: predicts tokens, steps, memory and time of a run, without starting it."""

from __future__ import annotations

from lorafit.cli import options
from lorafit.cli.output import load_torch, put_json, put_line


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

    load_torch()
    from lorafit.observe.console import table
    from lorafit.plan.planner import plan_run
    from lorafit.plan.table import table_rows

    prediction = plan_run(config)
    if as_json:
        put_json(prediction.as_dict())
        return
    if prediction.picked:
        put_line(prediction.picked, err=True)
    table(["plan", "", ""], table_rows(prediction))
