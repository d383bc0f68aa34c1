"""The serving process: its address and token, what it says at the start, and how it stops."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import uvicorn

from lorafit.errors import ConfigError
from lorafit.infer.continuous_batch import ContinuousBatch, Request
from lorafit.infer.multi_adapter import Models
from lorafit.observe.console import printable
from lorafit.serve.app import make_app
from lorafit.serve.auth import Guard
from lorafit.serve.jobs import Answering

TOKEN_VARIABLE = "LORAFIT_SERVE_TOKEN"  # noqa: S105 (a name, not a token)
MAX_BYTES = 4 * 2**20
_STOP_SECONDS = 30
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_ANY = ("0.0.0.0", "::")  # noqa: S104 (compared with, not bound to)


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen. `hosts` are more names that the server goes by."""

    host: str
    port: int
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Token:
    """What a client has to send, and whether it was made for this process."""

    value: str
    is_new: bool


def find_token() -> Token:
    """The token in LORAFIT_SERVE_TOKEN, else a new one. Raises ConfigError for one that would not do."""
    given = os.environ.get(TOKEN_VARIABLE)
    if given is None:
        return Token(secrets.token_urlsafe(32), is_new=True)
    if not re.fullmatch(r"[!-~]{16,512}", given):
        raise ConfigError(
            f"{TOKEN_VARIABLE} is not a token: at least 16 visible ASCII characters",
            hint=f"leave {TOKEN_VARIABLE} out, and a token is made and shown",
        )
    return Token(given, is_new=False)


def listen(place: Address) -> socket.socket:
    """A socket that listens there. Raises ConfigError where that cannot be."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            place.host, place.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address, family=family, backlog=256)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        hint = "give another --port (0 takes a free one) or --host"
        raise ConfigError(f"cannot listen on {place.host}:{place.port}: {reason}", hint=hint) from None


def serve(
    models: Models,
    batch: ContinuousBatch,
    place: Address,
    listening: socket.socket,
    token: Token,
    *,
    max_waiting: int,
    timeout: float,
    ready: Callable[[Server], None] | None = None,
) -> None:
    """Answer until SIGINT or SIGTERM; answers under way are finished then, for half a minute at most."""
    batch.add("first", Request([0, 0], frozenset(), 1))  # compiles kernels, so that nobody has to wait for it
    port = listening.getsockname()[1]
    app = make_app(lambda: Answering(models, batch, max_waiting=max_waiting, timeout=timeout), _log)
    guarded = Guard(
        app,
        token=token.value,
        hosts=(*_LOOPBACK, *place.hosts, *([] if place.host in _ANY else [place.host])),
        any_address=place.host in _ANY,
        max_bytes=MAX_BYTES,
    )
    settings = uvicorn.Config(
        guarded,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        ws="none",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=_STOP_SECONDS,
    )
    server = Server(settings, lambda: _announce(models, batch, place, port, token))
    if ready is not None:
        ready(server)
    with contextlib.closing(listening):
        asyncio.run(server.serve(sockets=[listening]))


class Server(uvicorn.Server):
    """uvicorn's, which says when it listens, and whose process ends well after a signal to stop."""

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
            number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _announce(models: Models, batch: ContinuousBatch, place: Address, port: int, token: Token) -> None:
    host = f"[{place.host}]" if ":" in place.host else place.host
    url = f"http://{host}:{port}/v1"
    names = [f"{named.name} ({'adapter' if named.adapter else 'base'})" for named in models.named.values()]
    _log(f"models   {', '.join(names)}")
    _log(f"batch    {batch.num_slots} answers at a time, {batch.context:,} tokens each with its prompt")
    if place.host not in _LOOPBACK:
        _log("warning  others on the network can reach this server, and read what is sent: put TLS in front")
    if token.is_new:
        _log(f"token    {token.value}")
        _log("         (shown this once; clients send it as their API key)")
    else:
        _log(f"token    the one in {TOKEN_VARIABLE}")
    _log("stop     Ctrl-C")
    print(url, flush=True)


def _log(line: str) -> None:
    with contextlib.suppress(OSError):
        print(printable(line), file=sys.stderr, flush=True)
