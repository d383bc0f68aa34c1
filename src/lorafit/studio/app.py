"""The application: its routes, the headers of every reply, and its errors."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import sys
import traceback
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorafit.errors import LorafitError, Problem, RunError
from lorafit.report.escape import TEMPLATES
from lorafit.studio import compare, data_page, runs, start, take_away, talk
from lorafit.studio.folder import Folder
from lorafit.studio.jobs import Jobs
from lorafit.studio.live import LiveRuns, Summaries
from lorafit.studio.texts import LANGUAGES
from lorafit.studio.watch import Watcher
from lorafit.studio.web import HEADERS, HERE, LANGUAGE_COOKIE, html, local, problems_page, seen

OPEN = "/open"  # the one address that takes the token itself, and gives the cookie
_BUG = Problem(
    "an internal error", hint="this is a bug in lorafit; report it with what `lorafit studio` has printed"
)
_YEAR = 365 * 24 * 3600
_FILES = {
    "page.css": (TEMPLATES / "page.css", "text/css"),
    "page.js": (TEMPLATES / "page.js", "text/javascript"),
    "studio.css": (HERE / "static/studio.css", "text/css"),
    "studio.js": (HERE / "static/studio.js", "text/javascript"),
}


def make_app(folder: Path, token: str, cookie: str, is_ending: Callable[[], bool]) -> ASGIApp:
    """The application for the runs below `folder`; `cookie` is the name of the cookie that holds the token.

    Streams end when `is_ending` is true.
    """

    async def open_studio(request: Request) -> Response:
        if not hmac.compare_digest(request.query_params.get("token", "").encode(), token.encode()):
            return html(request, "refused.html", status=401, problem=None)
        # not a redirect: a browser that came from another program's link sends no strict cookie with that
        reply = HTMLResponse(
            '<!doctype html><title>lorafit</title><link rel="icon" href="data:,"><a href="/">lorafit studio</a>'
        )
        reply.headers["Refresh"] = "0; url=/"
        reply.set_cookie(cookie, token, httponly=True, samesite="strict", path="/")
        return reply

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        watching = asyncio.create_task(app.state.watcher.run())
        yield
        watching.cancel()
        await talk.close(app.state)
        for process in app.state.processes.values():
            await start.end(process)
        with contextlib.suppress(asyncio.CancelledError):
            await watching

    app = Starlette(
        routes=[
            Route(OPEN, open_studio),
            Route("/static/{name}", _static),
            Route("/language", _language, methods=["POST"]),
            Route("/events", _events),
            *runs.ROUTES,
            *start.ROUTES,
            *data_page.ROUTES,
            *compare.ROUTES,
            *talk.ROUTES,
            *take_away.ROUTES,
        ],
        lifespan=lifespan,
        exception_handlers={
            LorafitError: _refused,
            OSError: _not_possible,
            404: _not_found,
            Exception: _failed,
        },
    )
    app.router.redirect_slashes = False
    state = app.state
    state.folder, state.jobs = Folder(folder), Jobs(folder.expanduser().resolve())
    state.jobs.end_left()
    state.live, state.summaries = LiveRuns(), Summaries()
    state.processes, state.models = {}, None  # of start.py
    state.talk, state.row_pages = None, OrderedDict()  # of talk.py and data_page.py
    state.watcher = Watcher(state.folder, state.jobs.advance, is_ending)
    return _WithHeaders(app)


class _WithHeaders:
    """ASGI middleware: every reply has HEADERS."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, sending)


async def _static(request: Request) -> Response:
    found = _FILES.get(request.path_params["name"])
    if found is None:
        return await _not_found(request, RunError(""))
    path, kind = found
    return Response(path.read_bytes(), media_type=kind)


async def _language(request: Request) -> Response:
    to = request.query_params.get("to", "")
    reply = seen(local(request.query_params.get("back", "/")))
    if to in LANGUAGES:
        reply.set_cookie(LANGUAGE_COOKIE, to, max_age=_YEAR, httponly=True, samesite="strict", path="/")
    return reply


async def _events(request: Request) -> Response:
    return StreamingResponse(request.app.state.watcher.events(), media_type="text/event-stream")


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, LorafitError)
    return problems_page(request, error)


async def _not_possible(request: Request, error: Exception) -> Response:
    """A disk that is full, a file that went away, a folder that nobody may read."""
    assert isinstance(error, OSError)
    return problems_page(request, RunError(error.strerror or str(error), place=str(error.filename or "")))


async def _failed(request: Request, error: Exception) -> Response:
    print("".join(traceback.format_exception(error)).rstrip(), file=sys.stderr)
    return html(request, "problems.html", status=500, problems=[_BUG])


async def _not_found(request: Request, error: Exception) -> Response:
    return html(request, "problems.html", status=404, problems=())
