"""A server on loopback in a thread of the test, and small models to put behind it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
from tests.tiny_models import random_network, write_adapter, write_model
from tests.waiting import HANGS, until

from lorafit.infer.continuous_batch import ContinuousBatch
from lorafit.infer.multi_adapter import Models, load_many
from lorafit.infer.scheduler import Scheduler
from lorafit.model.lora import LoraSpec
from lorafit.serve.server import AccessToken, Address, Server, listen, serve

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
    def scheduler(self) -> Scheduler:
        app = self.server.config.app.app  # type: ignore[union-attr]  the guard's
        scheduler = app.state.service.scheduler
        assert isinstance(scheduler, Scheduler)
        return scheduler

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
) -> Iterator[Live]:
    """A server for `models` while the block runs."""
    batch = ContinuousBatch(models.network, slots, context, models.adapters)
    place = Address("127.0.0.1", 0, hosts)
    listening = listen(place)
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
            ready=started.append,
        )

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=HANGS) as client:
        until(lambda: started and started[0].started, lambda: None if thread.is_alive() else "the thread")
        try:
            yield Live(url, client, started[0], batch)
        finally:
            started[0].should_exit = True
            thread.join(HANGS)
            assert not thread.is_alive()
