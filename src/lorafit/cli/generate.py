"""`lorafit generate`: answers prompts with a run, an adapter or a base model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorafit.cli import options
from lorafit.cli.output import load_torch, put_json, put_line, put_text


def generate(
    source: options.SourceArgument,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT",
            help="Prompts; without any, one per line of standard input.",
            show_default=False,
        ),
    ] = None,
    adapter: options.AdapterOption = None,
    base: options.BaseOption = False,
    compare: options.CompareOption = False,
    system: options.SystemOption = None,
    max_tokens: options.MaxTokensOption = 256,
    temperature: options.TemperatureOption = 0.0,
    top_k: options.TopKOption = 0,
    top_p: options.TopPOption = 1.0,
    seed: options.SeedOption = 0,
    device: options.DeviceOption = "auto",
    quantize: options.QuantizeOption = None,
    offline: options.OfflineOption = False,
    other_base: options.OtherBaseOption = False,
    as_json: options.JsonOption = False,
    file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Prompts from a file: JSONL, JSON, or text with one per line.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSONL or JSON file for the answers to --file, not standard output.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Answer prompts. A single answer is printed while it is generated.

    lorafit generate runs/tinyllama "What is a llama?"

    lorafit generate runs/tinyllama --file prompts.jsonl --output answers.jsonl
    """
    import sys

    from lorafit.errors import ConfigError
    from lorafit.storage.safe_read import read_stdin_lines

    if file is not None and (prompts or compare or as_json):
        raise ConfigError("--file cannot be combined with prompts, --compare or --json")
    if file is None and output is not None:
        raise ConfigError("--output needs a --file", hint="add --file prompts.jsonl")
    if file is None and not prompts:
        if not sys.stdin.isatty():
            prompts = [line for line in read_stdin_lines(sys.stdin) if line.strip()]
        if not prompts:
            raise ConfigError("there is no prompt", hint='lorafit generate RUN "What is a llama?"')

    load_torch()
    from lorafit.infer.model import load
    from lorafit.infer.sampling import Sampling
    from lorafit.observe.console import side_by_side

    model = load(
        source,
        adapter=adapter,
        device=device,
        system=system,
        offline=offline,
        quantize=quantize,
        other_base=other_base,
    )
    if base or compare:
        model.require_adapter(source)
    sampling = Sampling(temperature, top_k, top_p, seed)
    if file is not None:
        from lorafit.infer.bulk import answer_file

        answer_file(model, file, output, max_tokens=max_tokens, sampling=sampling, base=base, show=put_line)
        return
    assert prompts
    if len(prompts) == 1 and not (compare or as_json):
        for piece in model.stream(prompts[0], max_tokens=max_tokens, sampling=sampling, base=base):
            put_text(piece, end="")
        put_line()
        return
    answers = model.generate(prompts, max_tokens=max_tokens, sampling=sampling, base=base)
    if compare:
        of_base = model.generate(prompts, max_tokens=max_tokens, sampling=sampling, base=True)
        for prompt, before, after in zip(prompts, of_base, answers, strict=True):
            side_by_side(prompt, before.text, after.text)
        return
    for prompt, answer in zip(prompts, answers, strict=True):
        if as_json:
            record = {"prompt": prompt, "answer": answer.text, "stopped": answer.stopped}
            put_json(record)
        else:
            put_text(f"> {prompt}\n{answer.text}\n")
