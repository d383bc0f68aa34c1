"""`lorafit generate`: answer prompts with a run, an adapter or a base model."""

from __future__ import annotations

from typing import Annotated, Literal

import typer


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
) -> None:
    """Answer prompts; a single answer streams as it is made."""
    import json
    import sys

    from lorafit.errors import ConfigError

    if not prompts:
        if sys.stdin.isatty():
            raise ConfigError("there is no prompt", hint='lorafit generate RUN "What is a llama?"')
        prompts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise ConfigError("there is no prompt", hint="standard input was empty")

    from lorafit.infer.model import load
    from lorafit.infer.sampling import Sampling
    from lorafit.observe.terminal import printable, side_by_side

    model = load(source, adapter=adapter, device=device, system=system, offline=offline, quantize=quantize)
    if (base or compare) and not model.has_adapter:
        raise ConfigError(
            f"`{source}` has no adapter, it is a base model", hint="leave --base and --compare out"
        )
    sampling = Sampling(temperature, top_k, top_p, seed)
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
            typer.echo(json.dumps(record, ensure_ascii=False))
        else:
            typer.echo(f"> {printable(prompt)}\n{printable(answer.text)}\n")
