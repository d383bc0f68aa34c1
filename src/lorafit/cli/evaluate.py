"""`lorafit eval`: base, adapter and exports of a run side by side, on held-out rows and on tasks."""

from __future__ import annotations

from typing import Annotated, Literal

import typer


def evaluate(
    run: Annotated[str, typer.Argument(help="Run directory.")],
    exports: Annotated[
        list[str] | None,
        typer.Option("--export", help="Merged export to measure too; may be repeated.", show_default=False),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="JSONL file of prompts with answers; may be repeated.", show_default=False),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer to a task.")] = 256,
    quantize: Annotated[
        Literal["none", "int8", "nf4", "fp8"] | None,
        typer.Option(help="How the base is held; otherwise as in training.", show_default=False),
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Never open a connection.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line, one line a model.")
    ] = False,
) -> None:
    """Measure what a run has come to: loss and perplexity on held-out rows, tasks answered right.

    lorafit eval runs/demo --tasks questions.jsonl --export runs/demo/exports/merged-bf16
    """
    import json
    from pathlib import Path

    from lorafit.evaluate.run import evaluate_run
    from lorafit.observe.console import table

    measured = evaluate_run(
        run,
        exports=exports or [],
        tasks=tasks or [],
        max_tokens=max_tokens,
        quantize=quantize,
        offline=offline,
    )
    if as_json:
        for result in measured:
            typer.echo(json.dumps(result.as_dict()))
        return
    headers = ["model", "held-out loss", "perplexity"]
    for file in tasks or []:
        headers += [Path(file).name, "ended"]
    rows = []
    for result in measured:
        row = [result.model, *("-" if n is None else f"{n:.4f}" for n in (result.loss, result.perplexity))]
        for score in result.scores.values():
            row += [f"{score.right} of {score.total}", f"{score.ended}"]
        rows.append(row)
    table(headers, rows)
