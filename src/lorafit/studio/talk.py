"""Talk with the base and runs side by side, by way of one `lorafit serve` that the studio starts on loopback."""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from lorafit.errors import ConfigError, LorafitError
from lorafit.redact import printable, redact, shell
from lorafit.run_dir import RunDirectory
from lorafit.serve.listening import TOKEN_VARIABLE
from lorafit.storage.safe_read import parse_json
from lorafit.studio.folder import Folder
from lorafit.studio.web import form, html, listed, seen

if TYPE_CHECKING:
    import httpx

MOST_RUNS = 8
TASKS = "tasks.jsonl"
_LOG = 8000
_ADDRESS = re.compile(r"http://127\.0\.0\.1:\d{1,5}/v1")


@dataclass
class Server:
    """The `lorafit serve` of the studio: `models` are its names once it listens at `url`."""

    ids: list[str]
    command: str
    process: asyncio.subprocess.Process
    token: str
    url: str = ""
    models: list[str] = field(default_factory=list)
    log: str = ""

    @property
    def state(self) -> str:
        """loading, ready or failed."""
        if self.process.returncode is not None:
            return "failed"
        return "ready" if self.models else "loading"

    @property
    def base(self) -> str:
        """The name of the base, which comes after the runs; "" where it is not served."""
        return self.models[-1] if len(self.models) > len(self.ids) else ""


async def _talk(request: Request) -> Response:
    state = request.app.state
    folder: Folder = state.folder
    runs = await asyncio.to_thread(_with_adapter, folder)
    return html(
        request,
        "talk.html",
        runs=runs,
        asked=request.query_params.getlist("run"),
        server=state.talk,
        tasks=str(folder.path / TASKS),
    )


def _with_adapter(folder: Folder) -> list[tuple[str, str]]:
    """(id, name) of the runs that can answer: with an adapter or a checkpoint."""
    return [
        (name, folder.name_of(run))
        for name, run in folder.scan().items()
        if run.adapter.is_dir() or run.saved_steps()
    ]


async def _open(request: Request) -> Response:
    state = request.app.state
    names = list(dict.fromkeys(await listed(request, "run")))[:MOST_RUNS]
    if not names:
        raise ConfigError("no run is chosen", hint="choose one or more runs of the same base model")
    runs: list[RunDirectory] = [state.folder.run(name) for name in names]
    await close(state)
    words = ["serve", *(str(run.path) for run in runs), "--port", "0", "--offline"]
    token = secrets.token_urlsafe(32)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "lorafit", *words),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, TOKEN_VARIABLE: token, "NO_COLOR": "1"},
    )
    await asyncio.to_thread(state.jobs.tie, process.pid)
    state.talk = Server(names, shell("lorafit", *words), process, token)
    state.talk_reader = asyncio.create_task(_read(state.talk))
    return seen("/talk?" + "&".join(f"run={name}" for name in names))


async def _read(server: Server) -> None:
    """Read what the server prints: its address, and why it ends."""
    import httpx

    assert server.process.stdout is not None
    while line := await server.process.stdout.readline():
        text = printable(line.decode(errors="replace"))
        server.log = redact(server.log + text)[-_LOG:]
        if not server.url and (match := _ADDRESS.search(text)):
            server.url = match[0]
            try:
                async with _client(server) as client:
                    reply = await client.get("/models")
                    server.models = [str(model["id"]) for model in reply.json()["data"]]
            except (httpx.HTTPError, KeyError, ValueError) as error:
                server.log += f"the server names no models: {error!r}\n"
                server.process.terminate()
    await server.process.wait()


def _client(server: Server) -> httpx.AsyncClient:
    import httpx

    headers = {"Authorization": f"Bearer {server.token}"}
    return httpx.AsyncClient(base_url=server.url, headers=headers, timeout=600, trust_env=False)


async def close(state: Any) -> None:
    """End the server of the talk, if there is one."""
    server: Server | None = state.talk
    if server is not None and server.process.returncode is None:
        server.process.terminate()
        try:
            await asyncio.wait_for(server.process.wait(), 5)
        except TimeoutError:
            server.process.kill()
    state.talk = None


async def _close(request: Request) -> Response:
    await close(request.app.state)
    return seen("/talk")


async def _answer(request: Request) -> Response:
    """The answer of one model as server-sent events, as `lorafit serve` streams it."""
    server: Server | None = request.app.state.talk
    if server is None or server.state != "ready":
        return JSONResponse({"error": {"message": "no model is loaded"}}, 409)
    try:
        asked = parse_json(await request.body())
        known = {"model", "messages", "max_tokens", "temperature", "top_p", "seed"}
        sent = {key: value for key, value in asked.items() if key in known and value is not None}
    except (ValueError, AttributeError):
        return JSONResponse({"error": {"message": "the request is no JSON object"}}, 400)
    return StreamingResponse(_stream(server, {**sent, "stream": True}), media_type="text/event-stream")


async def _stream(server: Server, asked: dict[str, Any]) -> AsyncIterator[bytes]:
    import httpx

    try:
        async with _client(server) as client, client.stream("POST", "/chat/completions", json=asked) as reply:
            if reply.status_code != 200:
                yield b"data: " + (await reply.aread()).replace(b"\n", b" ") + b"\n\n"
                return
            async for piece in reply.aiter_bytes():
                yield piece
    except httpx.HTTPError:
        yield b'data: {"error": {"message": "the model has ended"}}\n\n'


async def _task(request: Request) -> Response:
    """Append a question with its right answer to the tasks file below the folder."""
    fields = await form(request)
    prompt, answer = fields.get("prompt", "").strip(), fields.get("answer", "").strip()
    if not prompt or not answer:
        raise ConfigError("a task is a question with its right answer")
    path: Path = request.app.state.folder.path / TASKS
    task = {"prompt": prompt, "answer": answer}
    if system := fields.get("system", "").strip():
        task["system"] = system

    def append() -> None:
        from lorafit.storage.safe_read import open_no_follow

        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open_no_follow(path, "ab") as file:
                file.write((json.dumps(task, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))
        except OSError as error:
            raise LorafitError(
                f"cannot write the tasks: {error.strerror or error}", place=str(path)
            ) from None

    await asyncio.to_thread(append)
    return JSONResponse({"path": str(path)})


ROUTES = [
    Route("/talk", _talk),
    Route("/talk/open", _open, methods=["POST"]),
    Route("/talk/close", _close, methods=["POST"]),
    Route("/talk/answer", _answer, methods=["POST"]),
    Route("/talk/task", _task, methods=["POST"]),
]
