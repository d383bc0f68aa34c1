"""`lorafit check`: whether a run will learn what its rows say, before it starts: a verdict a line."""

from __future__ import annotations

from typing import Annotated

import typer


def check(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [SECTION.KEY=VALUE]...",
            help="A recipe (a YAML file or a shipped name) and overrides, as for `lorafit train`.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Base model, or a folder with its tokenizer alone.", show_default=False),
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
    data_only: Annotated[
        bool, typer.Option("--data-only", help="Rows and settings alone: no weight is read.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Look at rows, settings and model before a run; exit code 2 if anything would go wrong.

    lorafit check --data alpaca_data.json

    lorafit check --model TinyLlama/TinyLlama-1.1B-Chat-v1.0 --data alpaca_data.json
    """
    from lorafit.check import run
    from lorafit.check.preflight import histogram
    from lorafit.check.verdict import summary
    from lorafit.config.load import config_from_args, flag_overrides
    from lorafit.errors import ConfigError, LorafitError
    from lorafit.redact import json_line

    flags = flag_overrides(model=model, data=data, output=output)
    words = settings or []
    try:
        try:
            config = config_from_args(words, recipe, flags)
            alone = data_only or not run.has_weights(config)
            checked = run.check_data(config) if alone else run.check_run(config)
        except ConfigError as error:
            if [problem.message for problem in error.problems] != ["`model.name` is missing"]:
                raise
            config = config_from_args(words, recipe, {**flags, "model.name": "none"})
            checked = run.check_texts(config)
    except LorafitError as error:
        checked = run.refused(error)
    if as_json:
        typer.echo(json_line(checked.as_dict()))
    else:
        from lorafit.observe.console import print_verdicts

        print_verdicts([(verdict.verdict, verdict.name, verdict.text) for verdict in checked.verdicts])
        if checked.lengths is not None:
            for line in histogram(checked.lengths):
                typer.echo(line, err=True)
        typer.echo(summary(checked.verdicts), err=True)
    if any(verdict.verdict == "fail" for verdict in checked.verdicts):
        raise typer.Exit(2)
