"""The server process: its address and token, its start and its stop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import math
import os
import re
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import uvicorn

from lorafit.errors import ConfigError
from lorafit.infer.continuous_batch import ContinuousBatch, Request
from lorafit.infer.multi_adapter import Models
from lorafit.infer.scheduler import Ticket
from lorafit.redact import line
from lorafit.serve.app import make_app
from lorafit.serve.auth import Guard
from lorafit.serve.connection import protocol
from lorafit.serve.jobs import AnswerService
from lorafit.serve.limits import BACKLOG, Limits, connections_within

TOKEN_VARIABLE = "LORAFIT_SERVE_TOKEN"  # noqa: S105 (a name, not a token)
_STOP_SECONDS = 30
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_ANY = ("0.0.0.0", "::")  # noqa: S104 (compared with, not bound to)


@dataclass(frozen=True, slots=True)
class Address:
    """The address to listen on. `hosts` are additional names of the server."""

    host: str
    port: int
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AccessToken:
    """The token that clients must send. `is_new` is True when this process generated it."""

    value: str
    is_new: bool


def find_token() -> AccessToken:
    """The token in LORAFIT_SERVE_TOKEN, or a new one. Raises ConfigError for an unsuitable token."""
    value = os.environ.get(TOKEN_VARIABLE)
    if value is None:
        return AccessToken(secrets.token_urlsafe(32), is_new=True)
    if not re.fullmatch(r"[!-~]{16,512}", value):
        raise ConfigError(
            f"{TOKEN_VARIABLE} is not a token of 16 to 512 visible ASCII characters",
            hint=f"unset {TOKEN_VARIABLE}: the server generates and shows a token",
        )
    return AccessToken(value, is_new=False)


def listen(address: Address) -> socket.socket:
    """A socket that listens on `address`. Raises ConfigError where that is not possible."""
    try:
        family, _, _, _, resolved = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(resolved, family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        message = f"cannot listen on {address.host}:{address.port}: {reason}"
        raise ConfigError(message, hint="give another --port (0 takes a free one) or --host") from None


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
        hosts=(*_LOOPBACK, *address.hosts, *([] if address.host in _ANY else [address.host])),
        any_address=address.host in _ANY,
        limits=limits,
    )
    settings = uvicorn.Config(
        guarded,
        http=cast(type[asyncio.Protocol], protocol(limits)),
        backlog=BACKLOG,
        log_config=None,
        log_level="error",  # a warning for each request that is not HTTP would fill the log
        access_log=False,
        server_header=False,
        lifespan="on",
        ws="none",
        timeout_keep_alive=math.ceil(limits.head_seconds),  # after that of the connection itself
        timeout_graceful_shutdown=_STOP_SECONDS,
    )
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


class Server(uvicorn.Server):
    """uvicorn's server. It calls `announce` when it listens, and a signal to stop ends the process with code 0."""

    def __init__(self, config: uvicorn.Config, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._announce()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, self.handle_exit)
            for number in (signal.SIGINT, signal.SIGTERM)
            if signal.getsignal(number) is not signal.SIG_IGN  # a script's `&` ignores SIGINT
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _announce(
    models: Models, batch: ContinuousBatch[Ticket], address: Address, port: int, token: AccessToken
) -> None:
    host = f"[{address.host}]" if ":" in address.host else address.host
    url = f"http://{host}:{port}/v1"
    names = [f"{named.name} ({'adapter' if named.adapter else 'base'})" for named in models.named.values()]
    _log(f"models   {', '.join(names)}")
    _log(f"batch    {batch.num_slots} answers at a time, each {batch.context:,} tokens with its prompt")
    if address.host not in _LOOPBACK:
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
