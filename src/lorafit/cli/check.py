"""`lorafit check`: checks rows, settings and model before a run, and prints one result per line."""

from __future__ import annotations

from typing import Annotated

import typer

from lorafit.cli import options
from lorafit.cli.output import load_torch, put_json, put_line


def check(
    settings: options.Overrides = None,
    model: options.ModelOption = None,
    data: options.DataOption = None,
    output: options.OutputOption = None,
    recipe: options.RecipeOption = None,
    data_only: Annotated[
        bool, typer.Option("--data-only", help="Check rows and settings. No weights are read.")
    ] = False,
    as_json: options.JsonOption = False,
) -> None:
    """Check rows, settings and model before a run. The exit code is 2 if a check fails.

    lorafit check --data alpaca_data.json

    lorafit check --model TinyLlama/TinyLlama-1.1B-Chat-v1.0 --data alpaca_data.json
    """
    from lorafit.check import run
    from lorafit.check.preflight import histogram
    from lorafit.check.verdict import of_error, summary
    from lorafit.config.load import config_from_args, flag_overrides
    from lorafit.errors import ConfigError, LorafitError

    flags = flag_overrides(model=model, data=data, output=output)
    words = settings or []
    try:
        try:
            config = config_from_args(words, recipe, flags)
            without_model = data_only or not run.has_weights(config)
            if not without_model:
                load_torch()
            checked = run.check_data(config) if without_model else run.check_run(config)
        except ConfigError as error:
            if [problem.message for problem in error.problems] != ["`model.name` is missing"]:
                raise
            config = config_from_args(words, recipe, {**flags, "model.name": "none"})
            checked = run.check_texts(config)
    except LorafitError as error:
        checked = run.Checked(of_error(error))
    if as_json:
        put_json(checked.as_dict())
    else:
        from lorafit.observe.console import print_verdicts

        print_verdicts([(verdict.verdict, verdict.name, verdict.text) for verdict in checked.verdicts])
        for line in histogram(checked.lengths) if checked.lengths is not None else ():
            put_line(line, err=True)
        put_line(summary(checked.verdicts), err=True)
    if any(verdict.verdict == "fail" for verdict in checked.verdicts):
        raise typer.Exit(2)
