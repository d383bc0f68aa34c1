"""`lorafit audit`: recomputes steps of a run and compares them with what was recorded."""

from __future__ import annotations

from typing import Annotated

import typer

from lorafit.cli import options
from lorafit.cli.output import load_torch, put_json, put_line


def audit(
    run: options.RunArgument,
    steps: Annotated[int, typer.Option(min=0, help="Number of steps to recompute.")] = 5,
    seed: Annotated[
        int | None, typer.Option(help="Chooses the steps; random by default.", show_default=False)
    ] = None,
    as_json: options.JsonOption = False,
) -> None:
    """Recompute some steps of a run and compare them with its record. The exit code is 1 where they differ.

    lorafit audit runs/demo --steps 5
    """
    import secrets

    from lorafit.check.verdict import summary
    from lorafit.observe.console import print_verdicts

    load_torch()
    from lorafit.training.audit import audit as recompute

    chosen = secrets.randbelow(10**6) if seed is None else seed
    results = recompute(run, steps=steps, seed=chosen, quiet=as_json)
    if as_json:
        put_json({"seed": chosen, "checks": [result.as_dict() for result in results]})
    else:
        print_verdicts([(result.verdict, result.name, result.text) for result in results])
        put_line(f"{summary(results)}; --seed {chosen} chooses the same steps", err=True)
    if any(result.verdict == "fail" for result in results):
        raise typer.Exit(1)
