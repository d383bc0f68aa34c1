"""The server of a model: what it serves, and what it says at its start."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import socket
import sys
from collections.abc import Callable

from lorafit.infer.continuous_batch import ContinuousBatch, Request
from lorafit.infer.multi_adapter import Models
from lorafit.infer.scheduler import Ticket
from lorafit.observe.units import memory_size
from lorafit.redact import line
from lorafit.serve.app import make_app
from lorafit.serve.auth import Guard
from lorafit.serve.jobs import AnswerService
from lorafit.serve.limits import Limits, connections_within
from lorafit.serve.listening import (
    LOOPBACK,
    TOKEN_VARIABLE,
    AccessToken,
    Address,
    Server,
    settings_of,
)

_STOP_SECONDS = 30
_ANY = ("0.0.0.0", "::")  # noqa: S104 (compared with, not bound to)


def serve(
    models: Models,
    batch: ContinuousBatch[Ticket],
    address: Address,
    listening: socket.socket,
    token: AccessToken,
    *,
    max_waiting: int,
    timeout: float,
    limits: Limits | None = None,
    ready: Callable[[Server], None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM. Answers that are in progress then have 30 seconds to end.

    `limits` are the usual ones if None. `ready` gets the server before it starts.
    """
    warm_up = Request([0, 0], frozenset(), 1)  # compiles the kernels before the first client
    batch.add([(Ticket(warm_up, deadline=0.0), warm_up)])
    port = listening.getsockname()[1]
    app = make_app(lambda: AnswerService(models, batch, max_waiting=max_waiting, timeout=timeout), _log)
    if limits is None:
        limits = Limits()
    limits = dataclasses.replace(limits, connections=connections_within(limits.connections))
    guarded = Guard(
        app,
        token=token.value,
        hosts=(*LOOPBACK, *address.hosts, *([] if address.host in _ANY else [address.host])),
        any_address=address.host in _ANY,
        limits=limits,
    )
    settings = settings_of(guarded, limits, stop_seconds=_STOP_SECONDS)
    server = Server(settings, lambda: _announce(models, batch, address, port, token))
    if ready is not None:
        ready(server)
    gc.collect()
    gc.freeze()  # else each full collection, which stops all threads, looks at all that was loaded
    try:
        with contextlib.closing(listening):
            asyncio.run(server.serve(sockets=[listening]))
    finally:
        gc.unfreeze()


def _announce(
    models: Models, batch: ContinuousBatch[Ticket], address: Address, port: int, token: AccessToken
) -> None:
    host = f"[{address.host}]" if ":" in address.host else address.host
    url = f"http://{host}:{port}/v1"
    names = [f"{named.name} ({'adapter' if named.adapter else 'base'})" for named in models.named.values()]
    _log(f"models   {', '.join(names)}")
    _log(f"batch    {batch.num_slots} answers at a time, each {batch.context:,} tokens with its prompt")
    most = batch.num_slots * batch.bytes_per_slot
    kept = batch.kept.limit if batch.kept is not None else 0
    parts = f"{memory_size(most)} of these answers, {memory_size(kept)} of kept prompts"
    _log(f"memory   keys and values take at most {memory_size(most + kept)}: {parts}")
    if address.host not in LOOPBACK:
        _log("warning  the network can reach this server, and its traffic is not encrypted: put TLS in front")
    if token.is_new:
        _log(f"token    {token.value}")
        _log("         (shown only once; clients send it as their API key)")
    else:
        _log(f"token    the one in {TOKEN_VARIABLE}")
    _log("stop     Ctrl-C")
    print(line(url), flush=True)


def _log(text: str) -> None:
    with contextlib.suppress(OSError):
        print(line(text), file=sys.stderr, flush=True)
