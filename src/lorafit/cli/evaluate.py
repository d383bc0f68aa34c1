"""`lorafit eval`: measures base, adapter and exports of a run, on held-out rows and on tasks."""

from __future__ import annotations

from typing import Annotated

import typer

from lorafit.cli import options
from lorafit.cli.output import load_torch, put_json


def evaluate(
    run: options.RunArgument,
    exports: Annotated[
        list[str] | None,
        typer.Option(
            "--export",
            metavar="FOLDER",
            help="Merged export to measure too. Can be repeated.",
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE", help="JSONL file of prompts with answers. Can be repeated.", show_default=False
        ),
    ] = None,
    max_tokens: options.MaxTokensOption = 256,
    quantize: options.QuantizeOption = None,
    offline: options.OfflineOption = False,
    other_base: options.OtherBaseOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Measure a run: loss and perplexity on held-out rows, and tasks answered correctly.

    lorafit eval runs/demo --tasks questions.jsonl --export runs/demo/exports/merged-bf16
    """

    load_torch()
    from lorafit.evaluate.run import evaluate_run, table_of
    from lorafit.observe.console import table

    results = evaluate_run(
        run,
        exports=exports or [],
        tasks=tasks or [],
        max_tokens=max_tokens,
        quantize=quantize,
        offline=offline,
        other_base=other_base,
    )
    if as_json:
        for result in results:
            put_json(result.as_dict())
    else:
        table(*table_of(results))
