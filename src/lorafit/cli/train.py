"""`lorafit train`: start a run from a recipe, overrides and flags, or resume one."""

from __future__ import annotations

import os
import sys
from typing import Annotated, NoReturn

import typer


def train(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [SECTION.KEY=VALUE]...",
            help="A recipe (a YAML file or a shipped name) and overrides. `lorafit config` lists the keys.",
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
    output: Annotated[str | None, typer.Option(help="Run directory to make.", show_default=False)] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe file or shipped name.", show_default=False)
    ] = None,
    auto: Annotated[
        bool,
        typer.Option("--auto", help="Where memory is short, pick settings that fit (run.too_large=auto)."),
    ] = False,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Go on with a run directory.", show_default=False)
    ] = None,
    accept_changes: Annotated[
        bool,
        typer.Option("--accept-changes", help="Resume although model, rows or settings differ, knowingly."),
    ] = False,
    nproc: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes on this machine, one a GPU: torchrun's agent starts them.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Fine-tune a model on instruction rows; leaves a run directory with a tested LoRA adapter.

    lorafit train --model TinyLlama/TinyLlama-1.1B-Chat-v1.0 --data alpaca_data.json

    lorafit train classic --data alpaca_data.json train.max_steps=100

    lorafit train --resume runs/tinyllama

    lorafit train --nproc 8 --model TinyLlama/TinyLlama-1.1B-Chat-v1.0 --data alpaca_data.json
    """
    from lorafit.config.load import config_from_args, flag_overrides, override_words
    from lorafit.distributed.env import ProcessEnv, mark_no_restart
    from lorafit.errors import ConfigError

    flags = flag_overrides(model=model, data=data, output=output, auto=auto)
    if resume is not None:
        overrides = settings or []
        if recipe is not None or flags or any("=" not in word for word in overrides):
            raise ConfigError(
                "--resume takes only settings (section.key=value): a run goes on as it was started",
                hint="start a new run with lora.init_from=RUN/adapter to change something else",
            )
        if nproc is not None:
            _launch(nproc, "--resume", resume, *overrides, *(["--accept-changes"] if accept_changes else []))
        from lorafit.training.run import resume_run

        result = resume_run(resume, overrides, accept_changes=accept_changes)
    else:
        config = config_from_args(settings or [], recipe, flags)
        if nproc is not None:
            from lorafit.run_dir import RunDirectory

            run = RunDirectory.new(config.run.output, config.model.name)
            recipes = [] if recipe is None else ["--recipe", recipe]
            _launch(nproc, *(settings or []), *override_words(flags), *recipes, "--output", str(run.path))
        from lorafit.training.run import start_run

        result = start_run(config)
    env = ProcessEnv.read()
    try:
        if env.is_main:
            typer.echo(result.adapter if result.finished else result.path)
            sys.stdout.flush()
    except OSError:  # the terminal was closed; the run is on disk all the same
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
    if not result.finished:
        mark_no_restart(env, 130)
        raise typer.Exit(130)
    if result.proven is False:  # said where it was found
        mark_no_restart(env, 1)
        raise typer.Exit(1)


def _launch(num_processes: int, *words: str) -> NoReturn:
    """Have several processes do it, and exit as they do."""
    from lorafit.distributed.launch import launch

    raise typer.Exit(launch(["train", *words], num_processes))
