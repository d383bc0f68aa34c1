"""The address, the token and the process of a server on this machine. What it serves is not known here."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import re
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import uvicorn
from starlette.types import ASGIApp

from lorafit.errors import ConfigError
from lorafit.serve.connection import protocol
from lorafit.serve.limits import BACKLOG, Limits

TOKEN_VARIABLE = "LORAFIT_SERVE_TOKEN"  # noqa: S105 (a name, not a token)
LOOPBACK = ("localhost", "127.0.0.1", "::1")


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


def find_token(variable: str = TOKEN_VARIABLE) -> AccessToken:
    """The token in `variable` of the environment, or a new one. Raises ConfigError for an unsuitable token."""
    value = os.environ.get(variable)
    if value is None:
        return AccessToken(secrets.token_urlsafe(32), is_new=True)
    if not re.fullmatch(r"[!-~]{16,512}", value):
        raise ConfigError(
            f"{variable} is not a token of 16 to 512 visible ASCII characters",
            hint=f"unset {variable}: the server generates and shows a token",
        )
    return AccessToken(value, is_new=False)


def listen(
    address: Address, hint: str = "give another --port (0 takes a free one) or --host"
) -> socket.socket:
    """A socket that listens on `address`. Raises ConfigError with `hint` where that is not possible."""
    try:
        family, _, _, _, resolved = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(resolved, family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        message = f"cannot listen on {address.host}:{address.port}: {reason}"
        raise ConfigError(message, hint=hint) from None


def settings_of(app: ASGIApp, limits: Limits, *, stop_seconds: int) -> uvicorn.Config:
    """uvicorn's settings for `app`. At the end, requests that are in progress have `stop_seconds` to end."""
    return uvicorn.Config(
        app,
        http=cast(type[asyncio.Protocol], protocol(limits)),
        backlog=BACKLOG,
        log_config=None,
        log_level="error",  # a warning for each request that is not HTTP would fill the log
        access_log=False,
        server_header=False,
        lifespan="on",
        ws="none",
        timeout_keep_alive=math.ceil(limits.head_seconds),  # after that of the connection itself
        timeout_graceful_shutdown=stop_seconds,
    )


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
