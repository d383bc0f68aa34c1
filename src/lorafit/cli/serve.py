"""`lorafit serve`: an OpenAI-compatible server for a run, more adapters on its base, and the base itself."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from lorafit.cli import options
from lorafit.cli.output import load_torch


def serve(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]SOURCE...",
            help="Run directory, PEFT adapter folder, model folder or hub id; more adapters on the same base.",
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8000,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Additional host name of the server. Can be repeated.", show_default=False),
    ] = None,
    slots: Annotated[int, typer.Option(min=1, max=1024, help="Answers generated at a time.")] = 16,
    queue: Annotated[int, typer.Option(min=0, max=100_000, help="Answers that can wait for a slot.")] = 64,
    context: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Most tokens of a prompt with its answer. The default is the model's, at most 4,096.",
            show_default=False,
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=1, max=86_400, help="Most seconds of a request, with its time in the queue.")
    ] = 300.0,
    kept_prompts: Annotated[
        int,
        typer.Option(
            min=0,
            max=1_000_000,
            help="MB of memory for beginnings of prompts that are read once; 0 keeps none.",
        ),
    ] = 256,
    device: options.DeviceOption = "auto",
    quantize: options.QuantizeOption = None,
    offline: options.OfflineOption = False,
    other_base: options.OtherBaseOption = False,
) -> None:
    """Serve models with OpenAI's API, on this machine and protected by a token.

    lorafit serve runs/tinyllama

    lorafit serve runs/one runs/two --port 9000
    """
    from lorafit.errors import ConfigError

    load_torch()
    try:
        from lorafit.serve.listening import Address, find_token, listen
        from lorafit.serve.server import serve
    except ImportError as error:
        raise ConfigError(f"`{error.name}` is missing", hint="pip install 'lorafit[serve]'") from None
    address = Address(host, port, tuple(allow_host or ()))
    token = find_token()
    with contextlib.closing(listen(address)) as listening:
        from lorafit.infer.continuous_batch import ContinuousBatch
        from lorafit.infer.kept_prompts import KeptPrompts
        from lorafit.infer.multi_adapter import check_context, load_many
        from lorafit.infer.scheduler import Ticket

        models = load_many(sources, device=device, offline=offline, quantize=quantize, other_base=other_base)
        context = check_context(context, models.network)
        kept = KeptPrompts(kept_prompts * 10**6)
        batch = ContinuousBatch[Ticket](models.network, slots, context, models.adapters, kept)
        serve(models, batch, address, listening, token, max_waiting=queue, timeout=timeout)
