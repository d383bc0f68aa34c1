"""`lorafit why`: the training rows that push an answer most."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafit.cli import options
from lorafit.cli.output import load_torch, put_json, put_line, put_text

if TYPE_CHECKING:
    from lorafit.evaluate.why import Why
    from lorafit.run_dir import RunDirectory

NUM_REMOVED = 10


def why(
    run: options.RunArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The prompt.")],
    answer: Annotated[
        str | None,
        typer.Option(help="The answer to explain; by default the greedy one.", show_default=False),
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=0, help="Rows to list; 0 for all.")] = 10,
    max_tokens: options.MaxTokensOption = 256,
    verify: Annotated[
        bool, typer.Option(help="Train the run again without the first ten rows, and show its answer.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="With --verify: also where that is a run from the start.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Run of --verify; by default RUN-without.", show_default=False),
    ] = None,
    as_json: options.JsonOption = False,
) -> None:
    """Name the training rows that push an answer most, by the similarity of their gradients and the answer's.

    lorafit why runs/mine "What is the capital of Atlantis?" --verify
    """
    load_torch()
    from lorafit.evaluate.why import explain
    from lorafit.observe.console import table
    from lorafit.report.rows_of_run import described
    from lorafit.run_dir import RunDirectory

    directory = RunDirectory.open(run)
    found = explain(directory, prompt, answer, max_tokens, quiet=as_json)
    most = described(found.data, found.pushes[: max(rows, NUM_REMOVED) if rows else None])
    listed = most[: rows or None]
    if as_json:
        put_json({"prompt": prompt, "answer": found.answer, "loss": found.loss, "rows": len(found.pushes)})
        for rank, row in enumerate(listed, 1):
            put_json({"rank": rank, **row})
    else:
        put_text(f"answer: {found.answer}")
        put_line(f"loss {found.loss:.3f} per token; {len(found.pushes):,} rows compared")
        cells = [[f"{row['score']:+.3f}", f"{row['loss']:.2f}", row["place"], _short(row)] for row in listed]
        table(["score", "loss", "row", "text"], cells)
    explained: dict[str, Any] = {"prompt": prompt, "answer": found.answer, "loss": found.loss}
    explained["rows"] = most[:NUM_REMOVED]
    _keep(directory, explained)
    if verify:
        explained["without"] = _verify(directory, prompt, found, max_tokens, output, yes, as_json)
        _keep(directory, explained)


def _short(row: Mapping[str, Any]) -> str:
    return " -> ".join(textwrap.shorten(row[key], 60, placeholder="...") for key in ("question", "answer"))


def _keep(run: RunDirectory, explained: Mapping[str, Any]) -> None:
    """Keep the answer for the page of the run, where its folder can be written."""
    from lorafit.errors import RunError
    from lorafit.evaluate.why import keep_for_page
    from lorafit.observe.console import note

    try:
        keep_for_page(run, explained)
    except RunError as error:
        note(f"not kept for the page of the run: {error}")


def _verify(
    run: RunDirectory, prompt: str, found: Why, max_tokens: int, output: Path | None, yes: bool, as_json: bool
) -> Mapping[str, Any]:
    """Train the run without the first rows, and show its answer and its loss of the first answer; returns both."""
    from lorafit.errors import RunError
    from lorafit.evaluate.why import mean_loss
    from lorafit.infer.model import load
    from lorafit.observe.console import note, side_by_side
    from lorafit.observe.units import count
    from lorafit.training.without import plan_removal, train_without

    numbers = [push.number for push in found.pushes[:NUM_REMOVED] if push.score > 0]
    if not numbers:
        raise RunError("no row pushes the answer", place=str(run.path), hint="leave out --verify")
    removal = plan_removal(run, found.data, numbers)
    beginning = removal.beginning(run, from_start=yes, option="--yes")
    if not as_json:
        note(beginning)
    result = train_without(run, removal, output or Path(f"{run.path}-without"), quiet=as_json)
    model = load(result.path)
    (after,) = model.generate([prompt], max_tokens=max_tokens)
    loss = mean_loss(model.network, found.tokens)
    found_after = {"answer": after.text, "loss": loss}
    if as_json:
        put_json(
            {"run": str(result.path), "from_step": removal.checkpoint or 0, "ids": removal.ids, **found_after}
        )
        return {**found_after, "removed": len(removal.ids)}
    side_by_side(prompt, found.answer, after.text, titles=("with the rows", "without"))
    put_line(
        f"loss of the first answer per token: {found.loss:.3f} -> {loss:.3f} without {count(len(removal.ids), 'row')}"
    )
    put_line(result.path)
    return {**found_after, "removed": len(removal.ids)}
