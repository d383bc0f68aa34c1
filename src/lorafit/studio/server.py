"""The process of the studio: its address, its token, its start and its stop."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

from lorafit.redact import line
from lorafit.serve.auth import Guard
from lorafit.serve.limits import Limits
from lorafit.serve.listening import LOOPBACK, Address, Server, find_token, listen, settings_of
from lorafit.studio.app import OPEN, make_app
from lorafit.studio.web import refusal

TOKEN_VARIABLE = "LORAFIT_STUDIO_TOKEN"  # noqa: S105 (a name, not a token)
HOST = "127.0.0.1"
_LIMITS = Limits(connections=256)
_OTHER_PORT = "a studio may run there already: open the address that it has printed, or give `--port 0`"
_STOP_SECONDS = 2  # streams of events end at the watcher's next look


def guarded_app(folder: Path, port: int, token: str, is_ending: Callable[[], bool] = lambda: False) -> Guard:
    """The application behind the checks of each request."""
    cookie = f"lorafit-studio-{port}"  # a browser keeps the cookies of all ports together
    return Guard(
        make_app(folder, token, cookie, is_ending),
        token=token,
        hosts=LOOPBACK,
        any_address=False,
        limits=_LIMITS,
        cookie=cookie,
        allow=": open the address that the studio has printed, with 127.0.0.1 or localhost",
        open_paths=(OPEN, "/static/page.css", "/static/studio.css"),
        refuse=refusal,
    )


def run_studio(
    folder: Path, port: int, *, show: Callable[[str], object], ready: Callable[[Server], None] | None = None
) -> None:
    """Serve the pages for the runs below `folder` until SIGINT or SIGTERM. `show` gets their address, once it works.

    Only this machine can connect. Raises ConfigError where `port` is not free.
    """
    token = find_token(TOKEN_VARIABLE)
    with contextlib.closing(listen(Address(HOST, port), _OTHER_PORT)) as listening:
        port = listening.getsockname()[1]
        url = f"http://{HOST}:{port}{OPEN}?token={token.value}"

        def announce() -> None:
            print(url, flush=True)
            print(line(f"stop     Ctrl-C; runs that were started go on ({folder})"), file=sys.stderr)
            show(url)

        server = Server(
            settings_of(
                guarded_app(folder, port, token.value, lambda: server.should_exit),
                _LIMITS,
                stop_seconds=_STOP_SECONDS,
            ),
            announce,
        )
        if ready is not None:
            ready(server)
        asyncio.run(server.serve(sockets=[listening]))
