"""`lorafit sweep`: many runs that differ in some keys, with a table and a picture of their results."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorafit.cli import options
from lorafit.cli.output import load_torch, put_json, put_line

if TYPE_CHECKING:
    from lorafit.sweep.trials import Trial


def sweep(
    settings: options.Overrides = None,
    model: options.ModelOption = None,
    data: options.DataOption = None,
    recipe: options.RecipeOption = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=V1,V2,...",
            help="A key and the values to try, or a range LOW..HIGH to draw from; may be repeated.",
            show_default=False,
        ),
    ] = None,
    draws: Annotated[
        int | None,
        typer.Option(
            "--random",
            min=1,
            help="Number of random points, instead of all combinations.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random points.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time, each in a process.")] = 1,
    output: Annotated[str, typer.Option(metavar="FOLDER", help="Folder of the sweep.")] = "runs/sweep",
    resume: Annotated[
        Path | None, typer.Option(metavar="SWEEP", help="Resume a sweep.", show_default=False)
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show which run begins, and no progress.")] = False,
    as_json: options.JsonOption = False,
) -> None:
    """Train with every combination of some values, or random ones. The same command again resumes the sweep.

    Runs of one base load it once. Their results are not verified (run.verify=true does, and loads the base again).

    lorafit sweep recipe.yaml --vary lora.rank=8,16 --vary lora.dropout=0,0.1

    lorafit sweep recipe.yaml --vary train.learning_rate=1e-5..1e-3 --random 12
    """
    from lorafit.config.load import flag_overrides
    from lorafit.errors import ConfigError

    load_torch()
    from lorafit.sweep.run import draw_curves, plan_points, run_sweep

    if resume is None:
        flags = flag_overrides(model=model, data=data, output=None)
        planned = plan_points(vary or [], draws, seed, settings or [], recipe, flags)
    elif settings or vary or draws is not None or model or data or recipe:
        raise ConfigError("--resume takes no settings: a sweep continues as it was begun")
    else:
        planned = None
    folder = resume or Path(output)
    results, code = run_sweep(folder, planned, jobs, _announce, quiet)
    picture = draw_curves(folder, results)
    if as_json:
        for result in results:
            put_json(result.as_dict())
    else:
        from lorafit.observe.console import table

        headings = ["trial", *results[0].trial.point, "state", "step", "loss", "held-out", "base"]
        table(headings, [result.cells() for result in results])
        sys.stdout.flush()
        put_line(f"picture {picture}", err=True)
    if code:
        raise typer.Exit(code)


def _announce(trial: Trial, what: str) -> None:
    put_line(f"{trial.title}  {what}", err=True)
