"""What one takes away of a run: its exports with their parity, the card, the upload, each as its command."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lorafit.errors import ConfigError
from lorafit.redact import shell
from lorafit.studio.compare import exports_of
from lorafit.studio.runs import run_of
from lorafit.studio.tables import tables_of
from lorafit.studio.web import form, html, seen

KINDS = ("adapter", "merged", "gguf", "gguf-lora", "ollama")  # a test compares them with the command's


async def _page(request: Request) -> Response:
    run = run_of(request)
    kinds = [(kind, shell("lorafit", "export", run.path, kind)) for kind in KINDS]
    tables = await asyncio.to_thread(tables_of, run)
    return html(
        request,
        "export.html",
        run_id=request.path_params["run"],
        name=run.path.name,
        kinds=kinds,
        push=shell("lorafit", "export", run.path, "adapter", "--push", "OWNER/NAME"),
        exports=exports_of(run),
        folder=str(run.exports),
        tables=[table for table in tables if table.name.startswith("exports")],
    )


async def _start(request: Request) -> Response:
    run, fields = run_of(request), await form(request)
    kind = fields.get("kind", "")
    if kind not in KINDS:
        raise ConfigError(f"there is no export `{kind}`", hint=f"one of {', '.join(KINDS)}")
    words = ["export", str(run.path), kind]
    job = await asyncio.to_thread(request.app.state.jobs.start, words, output=str(run.path))
    return seen(f"/jobs/{job.id}")


ROUTES = [
    Route("/runs/{run}/export", _page),
    Route("/runs/{run}/export", _start, methods=["POST"]),
]
