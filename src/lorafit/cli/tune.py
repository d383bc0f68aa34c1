"""`lorafit tune`: searches learning rate, rank and targets with short runs, and writes the best ones as a recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lorafit.cli import options
from lorafit.cli.output import load_torch, put_json, put_line


def tune(
    settings: options.Overrides = None,
    model: options.ModelOption = None,
    data: options.DataOption = None,
    recipe: options.RecipeOption = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=V1,V2,...",
            help="A key and the values to try, instead of the usual ones; may be repeated.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Time for the whole search, such as 20min.", show_default=False),
    ] = None,
    output: Annotated[
        str,
        typer.Option(metavar="FOLDER", help="Folder of the search. The same command again resumes it."),
    ] = "runs/tune",
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    as_json: options.JsonOption = False,
) -> None:
    """Find learning rate, rank and targets by short runs; the better half is trained on. Writes a recipe.

    lorafit tune --model MODEL --data rows.json --budget 20min
    """
    from lorafit.config.fields import budget_seconds
    from lorafit.config.load import flag_overrides
    from lorafit.errors import ConfigError
    from lorafit.observe.units import duration

    load_torch()
    from lorafit.sweep.halving import tune as search
    from lorafit.sweep.run import draw_curves

    place, hint = f"--budget {budget}", "give a duration, for example --budget 20min"
    try:
        seconds = budget_seconds(budget) if budget is not None else None
    except ValueError as error:
        raise ConfigError(str(error), place=place, hint=hint) from None
    if budget is not None and seconds is None:
        raise ConfigError("a search takes a duration, no clock time", place=place, hint=hint)
    folder = Path(output)
    flags = flag_overrides(model=model, data=data, output=None)

    def announce(text: str) -> None:
        put_line(text, err=True)

    tuned = search(folder, vary or [], settings or [], recipe, flags, seconds, announce, quiet)
    picture = draw_curves(folder, tuned.results)
    if as_json:
        for result in tuned.results:
            scores = [
                {"steps": one.steps, "loss": one.loss, "seconds": one.seconds} for one in tuned.of(result)
            ]
            put_json({**result.as_dict(), "scores": scores})
    else:
        from lorafit.observe.console import table

        steps = sorted({score.steps for score in tuned.scores})
        rows = []
        for result in tuned.results:
            losses = {score.steps: f"{score.loss:.4f}" for score in tuned.of(result)}
            took = duration(sum(score.seconds for score in tuned.of(result)))
            cells = [losses.get(step, "") for step in steps]
            rows.append([result.trial.name, *result.trial.point.values(), *cells, took])
        keys = [key.partition(".")[2] for key in tuned.results[0].trial.point]
        table(["trial", *keys, *(f"{step} steps" for step in steps), "time"], rows)
        sys.stdout.flush()
        put_line(f"picture {picture}", err=True)
    if tuned.recipe is None:
        raise typer.Exit(130)
    put_line(f"recipe {tuned.recipe}: lorafit train {tuned.recipe} trains {tuned.about_recipe}", err=True)
