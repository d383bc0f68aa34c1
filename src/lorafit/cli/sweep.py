"""`lorafit sweep`: many runs that differ in some keys, with a table and a picture of what they came to."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lorafit.sweep.trials import Trial


def sweep(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [SECTION.KEY=VALUE]...",
            help="What all runs have in common, as for `lorafit train`.",
            show_default=False,
        ),
    ] = None,
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
            "--random", min=1, help="So many random points instead of all combinations.", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random points.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Runs beside each other, each a process.")] = 1,
    model: Annotated[
        str | None, typer.Option(help="Base model: hub id or folder.", show_default=False)
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Rows: file, folder or hub data set; may be repeated.", show_default=False),
    ] = None,
    output: Annotated[str, typer.Option(help="Folder of the sweep.")] = "runs/sweep",
    recipe: Annotated[
        str | None, typer.Option(help="Recipe file or shipped name.", show_default=False)
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="SWEEP", help="Go on with a sweep.", show_default=False)
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no steps, only which run begins.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a run, best first.")] = False,
) -> None:
    """Train with every combination of some values, or random ones; the same command again goes on where it was.

    Runs of one base load it once. They are not proven at their end (run.verify=true does, and loads the base anew).

    lorafit sweep --model MODEL --data rows.json --vary lora.rank=8,16 --vary train.learning_rate=1e-4,3e-4

    lorafit sweep --model MODEL --data rows.json --vary train.learning_rate=1e-5..1e-3 --random 12 --jobs 2
    """
    from lorafit.config.load import config_from_args, flag_overrides
    from lorafit.errors import ConfigError
    from lorafit.sweep.space import draw, grid, parse_axes

    if resume is None:
        axes = parse_axes(vary or [])
        if not axes:
            raise ConfigError(
                "a sweep needs something that varies", hint="for example `--vary lora.rank=8,16,32`"
            )
        points = draw(axes, draws, seed) if draws is not None else grid(axes)
        flags = flag_overrides(model=model, data=data, output=None)
        planned = [
            (
                point,
                config_from_args(
                    ["run.verify=false", *(settings or [])],
                    recipe,
                    [*flags, *(f"{key}={value}" for key, value in point.items())],
                ),
            )
            for point in points
        ]
    elif settings or vary or draws is not None or model or data or recipe:
        raise ConfigError("--resume takes no settings: a sweep goes on as it was begun")

    from lorafit.sweep.trials import open_sweep, plan_sweep, work, work_beside_each_other

    folder = resume or Path(output)
    trials = open_sweep(folder) if resume is not None else plan_sweep(folder, planned)
    if jobs > 1 and sum(not trial.finished for trial in trials) > 1:
        code = work_beside_each_other(folder, jobs)
    else:
        code = 0 if work(trials, _say, quiet=quiet) else 130
    failed = _report(folder, trials, as_json)
    if code == 130 or failed:
        raise typer.Exit(130 if code == 130 else 2)


def _say(trial: Trial, what: str) -> None:
    varies = ", ".join(f"{key}={value}" for key, value in trial.point.items())
    typer.echo(f"{trial.name}  {varies}  {what}", err=True)


def _report(folder: Path, trials: list[Trial], as_json: bool) -> int:
    """Print what came out, best first, and draw it; returns how many failed."""
    from lorafit.observe.console import table
    from lorafit.observe.metrics_file import read_metrics
    from lorafit.observe.run_summary import summarize
    from lorafit.storage.atomic import write_file
    from lorafit.sweep.curves import curves_svg

    found = []
    for trial in trials:
        summary = summarize(trial.run) if trial.run.config_file.exists() else None
        state = "failed" if trial.error_file.exists() else summary.state if summary else "waiting"
        loss = (
            None
            if summary is None
            else summary.loss
            if summary.heldout_loss is None
            else summary.heldout_loss
        )
        found.append((trial, summary, state, loss))
    found.sort(key=lambda entry: (entry[3] is None, entry[3] or 0.0))
    curves = {
        ", ".join(f"{key.partition('.')[2]}={value}" for key, value in trial.point.items()): [
            (event["step"], event["loss"])
            for event in read_metrics(trial.run.metrics_file)
            if event["event"] == "heldout"
        ]
        for trial, _, state, _ in found
        if state != "failed" and trial.run.metrics_file.exists()
    }
    picture = folder / "sweep.svg"
    write_file(picture, curves_svg(f"Held-out loss, {folder.name}", curves))
    if as_json:
        for trial, summary, state, _ in found:
            losses = {} if summary is None else summary.as_dict()
            typer.echo(
                json.dumps({"run": str(trial.run.path), "varies": trial.point, **losses, "state": state})
            )
    else:
        names = list(trials[0].point)
        rows = [
            [trial.name, *trial.point.values(), *(summary.cells()[1:6] if summary else ["", "", "", "", ""])]
            for trial, summary, state, _ in found
        ]
        for row, (_, _, state, _) in zip(rows, found, strict=True):
            row[1 + len(names)] = state
        table(["trial", *names, "state", "step", "loss", "held-out", "base"], rows)
        sys.stdout.flush()
        typer.echo(f"picture {picture}", err=True)
    return sum(state == "failed" for _, _, state, _ in found)
