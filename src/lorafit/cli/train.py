"""`lorafit train`: starts a run from a recipe, overrides and flags, or resumes one."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Annotated, NoReturn

import typer

from lorafit.cli import options
from lorafit.cli.output import load_torch, put_line


def train(
    settings: options.Overrides = None,
    model: options.ModelOption = None,
    data: options.DataOption = None,
    output: options.OutputOption = None,
    recipe: options.RecipeOption = None,
    auto: options.AutoOption = False,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Resume a run directory.", show_default=False)
    ] = None,
    accept_changes: Annotated[
        bool,
        typer.Option("--accept-changes", help="Resume although model, rows or settings have changed."),
    ] = False,
    nproc: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of processes on this machine, one per GPU, started with torchrun's agent.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Fine-tune a model on instruction rows. The result is a run directory with a verified LoRA adapter.

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
                "--resume accepts only settings (section.key=value): a run resumes with its own recipe",
                hint="to change something else, start a new run with lora.init_from=RUN/adapter",
            )
        if nproc is not None:
            _launch(nproc, "--resume", resume, *overrides, *(["--accept-changes"] if accept_changes else []))
        load_torch()
        from lorafit.training.run import resume_run

        result = resume_run(resume, overrides, accept_changes=accept_changes)
    else:
        config = config_from_args(settings or [], recipe, flags)
        if nproc is not None:
            from lorafit.run_dir import RunDirectory

            run = RunDirectory.new(config.run.output, config.model.name)
            recipes = [] if recipe is None else ["--recipe", recipe]
            words = [*(settings or []), *override_words(flags), *recipes, "--output", str(run.path)]
            with run.removed_on_failure() if config.run.output is None else contextlib.nullcontext():
                _launch(nproc, *words)
        load_torch()
        from lorafit.training.run import start_run

        result = start_run(config)
    env = ProcessEnv.read()
    try:
        if env.is_main:
            put_line(result.adapter if result.finished else result.path)
            sys.stdout.flush()
    except OSError:  # the terminal was closed; the run is on disk
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
    if not result.finished:
        mark_no_restart(env, 130)
        raise typer.Exit(130)
    if result.proven is False:  # the proof has printed the reason
        mark_no_restart(env, 1)
        raise typer.Exit(1)


def _launch(num_processes: int, *words: str) -> NoReturn:
    """Run the command in several processes, and exit with their code."""
    from lorafit.distributed.launch import launch

    raise typer.Exit(launch(["train", *words], num_processes))
