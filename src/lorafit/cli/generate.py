"""`lorafit generate`: answer prompts with a run, an adapter or a base model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from lorafit.infer.model import Model
    from lorafit.infer.sampling import Sampling


def generate(
    source: Annotated[
        str, typer.Argument(help="Run directory, PEFT adapter folder, model folder or hub id.")
    ],
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="Prompts; without any, one a line from standard input.", show_default=False),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="PEFT adapter to put on a base model.", show_default=False)
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Leave the adapter out.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Base and tuned answers side by side.")] = False,
    system: Annotated[
        str | None, typer.Option(help="System prompt instead of the run's.", show_default=False)
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from the k likeliest tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from this share of the mass.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    quantize: Annotated[
        Literal["none", "int8", "nf4", "fp8"] | None,
        typer.Option(help="How the base is held; a run is loaded as it was trained.", show_default=False),
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Never open a connection.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line: prompt, answer, stopped.")
    ] = False,
    file: Annotated[
        Path | None,
        typer.Option(help="Prompts from a file: JSONL, JSON or text, a prompt a line.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Answers to --file as JSONL; default standard output.", show_default=False),
    ] = None,
) -> None:
    """Answer prompts; a single answer streams as it is made.

    lorafit generate runs/tinyllama "What is a llama?"

    lorafit generate runs/tinyllama --file prompts.jsonl --output answers.jsonl
    """
    import sys

    from lorafit.errors import ConfigError
    from lorafit.redact import json_line
    from lorafit.storage.safe_read import read_stdin_lines

    if file is not None and (prompts or compare or as_json):
        raise ConfigError("--file goes with none of prompts, --compare and --json")
    if file is None and output is not None:
        raise ConfigError("--output is for the answers to a --file", hint="add --file prompts.jsonl")
    if file is not None:
        prompts = [""]  # they come from the file
    if not prompts:
        if sys.stdin.isatty():
            raise ConfigError("there is no prompt", hint='lorafit generate RUN "What is a llama?"')
        prompts = [line for line in read_stdin_lines(sys.stdin) if line.strip()]
    if not prompts:
        raise ConfigError("there is no prompt", hint="standard input was empty")

    from lorafit.infer.model import load
    from lorafit.infer.sampling import Sampling
    from lorafit.observe.console import side_by_side
    from lorafit.redact import printable

    model = load(source, adapter=adapter, device=device, system=system, offline=offline, quantize=quantize)
    if (base or compare) and not model.has_adapter:
        raise ConfigError(
            f"`{source}` has no adapter, it is a base model", hint="leave --base and --compare out"
        )
    sampling = Sampling(temperature, top_k, top_p, seed)
    if file is not None:
        _answer_file(model, file, output, max_tokens, sampling, base)
        return
    if len(prompts) == 1 and not (compare or as_json):
        for piece in model.stream(prompts[0], max_tokens=max_tokens, sampling=sampling, base=base):
            typer.echo(printable(piece), nl=False)
        typer.echo()
        return
    answers = model.generate(prompts, max_tokens=max_tokens, sampling=sampling, base=base)
    if compare:
        plain = model.generate(prompts, max_tokens=max_tokens, sampling=sampling, base=True)
        for prompt, before, after in zip(prompts, plain, answers, strict=True):
            side_by_side(prompt, before.text, after.text)
        return
    for prompt, answer in zip(prompts, answers, strict=True):
        if as_json:
            record = {"prompt": prompt, "answer": answer.text, "stopped": answer.stopped}
            typer.echo(json_line(record))
        else:
            typer.echo(f"> {printable(prompt)}\n{printable(answer.text)}\n")


def _answer_file(
    model: Model, file: Path, output: Path | None, max_tokens: int, sampling: Sampling, base: bool
) -> None:
    from lorafit.infer.bulk import AnswerFile, answers, line_of, purpose_of, read_questions
    from lorafit.observe.console import note
    from lorafit.observe.progress import progress

    asked = read_questions(file, model)
    kept = AnswerFile(output, purpose_of(file, model, max_tokens, sampling, base)) if output else None
    start = len(kept.lines) if kept else 0
    if start:
        note(f"going on after {start:,} of {len(asked):,} answers")
    settings = {"max_tokens": max_tokens, "sampling": sampling, "base": base, "start": start}
    try:
        with progress("answering") as advance:
            made = answers(model, asked, progress=lambda done: advance(done, len(asked)), **settings)  # type: ignore[arg-type]
            for index, answer in enumerate(made, start):
                line = line_of(index, asked[index], answer)
                if kept:
                    kept.add(line)
                else:
                    typer.echo(line)
    except KeyboardInterrupt:
        if kept:
            note(
                f"{len(kept.lines):,} of {len(asked):,} answers are kept; the same command goes on after them"
            )
        raise
    finally:
        if kept:
            kept.close()
    if kept:
        kept.finish()
        typer.echo(output)
