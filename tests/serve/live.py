"""A server on loopback in a thread of the test, and small models to put behind it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from tests.tiny_models import random_network, write_adapter, write_model
from tests.waiting import HANGS, until

from lorafit.infer.continuous_batch import ContinuousBatch
from lorafit.infer.kept_prompts import KeptPrompts
from lorafit.infer.multi_adapter import Models, load_many
from lorafit.model.lora import LoraSpec
from lorafit.serve import jobs
from lorafit.serve.jobs import AnswerService
from lorafit.serve.limits import Limits
from lorafit.serve.listening import AccessToken, Address, Server, listen
from lorafit.serve.server import serve

TOKEN = "a-token-of-the-tests"
CONTEXT = 32_768  # room for an answer that no test sees the end of


@dataclass(frozen=True)
class Live:
    """A running server; `client` sends the token."""

    url: str
    client: httpx.Client
    server: Server
    batch: ContinuousBatch

    @property
    def service(self) -> AnswerService:
        app = self.server.config.app.app  # type: ignore[union-attr]  the guard's
        service = app.state.service
        assert isinstance(service, AnswerService)
        return service

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self.service._loop

    def connect(self, content: bytes = b"", receive_buffer: int = 0) -> socket.socket:
        """A connection with `content` sent. `receive_buffer` is its size in bytes, 0 for the usual one."""
        host, port = self.url.removeprefix("http://").split(":")
        connection = socket.socket()
        connection.settimeout(HANGS)
        if receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.connect((host, int(port)))
        connection.sendall(content)
        return connection

    def load(self) -> tuple[int, int]:
        """(active, waiting)"""
        state = self.client.get("/health").json()
        return state["active"], state["waiting"]

    def until(self, what: Callable[[], bool]) -> None:
        until(what)


def write_models(folder: Path) -> list[str]:
    """Words for `load_many`: a base and two adapters on it."""
    base = write_model(folder / "base", max_position_embeddings=CONTEXT)
    words = []
    for seed, name in enumerate(("one", "two"), 1):
        spec = LoraSpec(4, 8.0, 0.0, ("all-linear",), False)
        network = random_network(max_position_embeddings=CONTEXT)
        words.append(str(write_adapter(folder / name, network, spec, seed, base=str(base))))
    return words


def write_and_load(folder: Path) -> Models:
    """The models of `write_models`, in float32."""
    from lorafit.model.dtypes import DTYPES

    models = load_many(write_models(folder), device="cpu", offline=True)
    models.network.to(DTYPES["float32"])
    return models


@contextlib.contextmanager
def live(
    models: Models,
    *,
    slots: int = 4,
    queue: int = 8,
    timeout: float = HANGS,
    hosts: tuple[str, ...] = (),
    context: int = CONTEXT,
    limits: Limits | None = None,
    send_buffer: int = 0,
) -> Iterator[Live]:
    """A server for `models` while the block runs. `send_buffer` is that of its connections, 0 for the usual one.

    It makes no pause after a long request that it refuses.
    """
    batch = ContinuousBatch(models.network, slots, context, models.adapters, KeptPrompts(10**8))
    place = Address("127.0.0.1", 0, hosts)
    listening = listen(place)
    if send_buffer:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    port = listening.getsockname()[1]
    started: list[Server] = []

    def run() -> None:
        token = AccessToken(TOKEN, is_new=False)
        serve(
            models,
            batch,
            place,
            listening,
            token,
            max_waiting=queue,
            timeout=timeout,
            limits=limits,
            ready=started.append,
        )

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{port}"
    with (
        pytest.MonkeyPatch.context() as patch,
        httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=HANGS) as client,
    ):
        patch.setattr(jobs, "_PAUSE", 0.0)
        until(lambda: started and started[0].started, lambda: None if thread.is_alive() else "the thread")
        try:
            yield Live(url, client, started[0], batch)
        finally:
            started[0].should_exit = True
            thread.join(HANGS)
            assert not thread.is_alive()
