"""`lorafit serve`: an OpenAI-compatible server for a run, more adapters on its base, and the base itself."""

from __future__ import annotations

import contextlib
from typing import Annotated, Literal

import typer


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
        typer.Option(help="Another host name that the server goes by; may be repeated.", show_default=False),
    ] = None,
    slots: Annotated[int, typer.Option(min=1, max=1024, help="Answers made at a time.")] = 16,
    queue: Annotated[int, typer.Option(min=0, max=100_000, help="Answers that may wait for a slot.")] = 64,
    context: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Tokens of a prompt with its answer; default the model's, 4,096 at most.",
            show_default=False,
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=1, max=86_400, help="Seconds a request may take, waiting included.")
    ] = 300.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    quantize: Annotated[
        Literal["none", "int8", "nf4", "fp8"] | None,
        typer.Option(help="How the base is held; default as the first run was trained.", show_default=False),
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Never open a connection to the hub.")] = False,
) -> None:
    """Serve models by OpenAI's API, on this machine and behind a token.

    lorafit serve runs/tinyllama

    lorafit serve runs/one runs/two --port 9000
    """
    from lorafit.errors import ConfigError

    try:
        from lorafit.serve.server import Address, find_token, listen, serve
    except ImportError as error:
        raise ConfigError(f"`{error.name}` is missing", hint="pip install 'lorafit[serve]'") from None
    place = Address(host, port, tuple(allow_host or ()))
    token = find_token()
    with contextlib.closing(listen(place)) as listening:
        from lorafit.infer.continuous_batch import ContinuousBatch
        from lorafit.infer.multi_adapter import check_context, load_many

        models = load_many(sources, device=device, offline=offline, quantize=quantize)
        batch = ContinuousBatch(
            models.network, slots, check_context(context, models.network), models.adapters
        )
        serve(models, batch, place, listening, token, max_waiting=queue, timeout=timeout)
