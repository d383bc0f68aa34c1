"""A studio in the process of the test: requests go to its application, and nothing listens."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
from starlette.applications import Starlette
from starlette.types import Message
from tests.waiting import HANGS

from lorafit.studio import data_page
from lorafit.studio.server import guarded_app

data_page.FIRST_SECONDS = HANGS  # how long a page waits for its rows: no test is about a slow machine
TOKEN, PORT = "a-token-of-the-tests", 8765
URL = f"http://127.0.0.1:{PORT}"


@dataclass
class Studio:
    """The pages for the runs below `folder`."""

    folder: Path

    def __post_init__(self) -> None:
        self.guard = guarded_app(self.folder, PORT, TOKEN)

    @property
    def app(self) -> Starlette:
        return self.guard.app._app  # type: ignore[attr-defined,no-any-return]

    def ask(self, path: str, method: str = "GET", *, token: bool = True, **options: Any) -> httpx.Response:
        headers = dict(options.pop("headers", {}))
        if token:
            headers.setdefault("authorization", f"Bearer {TOKEN}")

        async def asked() -> httpx.Response:
            transport = httpx.ASGITransport(app=self.guard, raise_app_exceptions=True)  # type: ignore[arg-type]
            async with httpx.AsyncClient(transport=transport, base_url=URL) as client:
                return await client.request(method, path, headers=headers, **options)

        return asyncio.run(asked())

    def raw(self, path: str) -> tuple[int, str]:
        """(status, text) of a request for exactly this path: clients resolve `..` in theirs."""
        sent: list[Message] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            sent.append(message)

        headers = [(b"host", URL.partition("//")[2].encode()), (b"authorization", f"Bearer {TOKEN}".encode())]
        scope = {"type": "http", "method": "GET", "path": unquote(path), "raw_path": path.encode()}
        scope |= {"query_string": b"", "headers": headers, "scheme": "http", "server": ("127.0.0.1", PORT)}
        asyncio.run(self.guard(scope, receive, send))
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent).decode()

    def send(self, path: str, **fields: str) -> httpx.Response:
        return self.ask(path, "POST", data=fields)

    def ids(self) -> dict[str, str]:
        """The id of each run, by its name."""
        folder = self.app.state.folder
        return {folder.name_of(run): name for name, run in folder.scan().items()}
