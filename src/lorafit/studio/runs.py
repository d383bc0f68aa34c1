"""The pages of runs: the list of all, one run while it trains and after, and what one does with it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lorafit.errors import RunError
from lorafit.observe.run_summary import Summary
from lorafit.redact import shell
from lorafit.run_dir import RunDirectory
from lorafit.studio.folder import Folder, note_of, write_note
from lorafit.studio.jobs import Jobs, stop_run
from lorafit.studio.web import form, html, listed, local, number_in, seen

SMOOTH = {"none": 0, "little": 90, "usual": 30, "much": 10}  # parts of a line; 0 draws the points alone


@dataclass(frozen=True, slots=True)
class Listed:
    """A run in the list."""

    id: str
    name: str
    summary: Summary
    note: str


def list_runs(request: Request) -> list[Listed]:
    """All runs of the folder with their summaries, newest first."""
    state = request.app.state
    folder: Folder = state.folder
    return [
        Listed(name, folder.name_of(run), state.summaries.of(run), note_of(run))
        for name, run in folder.scan().items()
    ]


def run_of(request: Request) -> RunDirectory:
    """The run that the address names. Raises RunError."""
    folder: Folder = request.app.state.folder
    return folder.run(request.path_params["run"])


async def _home(request: Request) -> Response:
    return await _list_page(request, "home.html")


async def _list(request: Request) -> Response:
    return await _list_page(request, "list.html")


async def _list_page(request: Request, template: str) -> Response:
    runs = await asyncio.to_thread(list_runs, request)
    jobs: Jobs = request.app.state.jobs
    known = {str(run.path) for run in request.app.state.folder.known().values()}
    # a training whose run is in the list is shown there
    shown = [
        job for job in jobs.listed() if not (job.trains and job.output in known and job.state != "failed")
    ]
    return html(request, template, runs=runs, jobs=shown, folder=str(request.app.state.folder.path))


async def _run(request: Request) -> Response:
    content = await asyncio.to_thread(_content, request)
    run = run_of(request)
    commands = {
        name: shell("lorafit", *words)
        for name, words in {
            "resume": ("train", "--resume", run.path),
            "report": ("report", run.path),
            "eval": ("eval", run.path),
            "serve": ("serve", run.path),
            "rows": ("rows", run.path),
        }.items()
    }
    return html(
        request,
        "run.html",
        run_id=request.path_params["run"],
        note=note_of(run),
        commands=commands,
        smooth=SMOOTH,
        **content,
    )


async def _live(request: Request) -> Response:
    content = await asyncio.to_thread(_content, request)
    return html(request, "live.html", run_id=request.path_params["run"], **content)


def _content(request: Request) -> dict[str, Any]:
    """What the page of a run shows of it. The report's modules load with the first such page."""
    from lorafit.report import page, sections
    from lorafit.studio.live import FIRST_SECONDS, ranks, seconds_left
    from lorafit.studio.tables import files_of, tables_of

    run, query = run_of(request), request.query_params
    live = request.app.state.live.of(run)
    facts = live.facts(FIRST_SECONDS, request.app.state.summaries.of)
    first, last = number_in(query, "from", -1), number_in(query, "to", -1)
    smooth = query.get("smooth", "usual") if query.get("smooth") in SMOOTH else "usual"
    view = sections.View((first, last) if 0 <= first < last else None, SMOOTH[smooth])
    state = facts.summary.state
    return {
        "facts": facts,
        "is_read": live.is_read,
        "badges": page.badges(facts),
        "details": page.details(facts),
        "tiles": page.tiles(facts),
        "ranks": ranks(facts),
        "left": seconds_left(facts) if state == "running" else None,
        "is_running": state == "running",
        "is_complete": state.is_complete,
        "loss": sections.loss(facts, view),
        "progress": sections.progress(facts, view),
        "sections": [
            (name, sections.__dict__[name](facts))
            for name in ("notes", "answers", "proof", "data", "row_list", "why", "rows", "reproduce")
        ],
        "tables": tables_of(run),
        "files": files_of(run),
        "chosen_smooth": smooth,
        "view_from": f"{first:.0f}" if view.span else "",
        "view_to": f"{last:.0f}" if view.span else "",
    }


async def _stop(request: Request) -> Response:
    await asyncio.to_thread(stop_run, run_of(request))
    return seen(f"/runs/{request.path_params['run']}")


async def _resume(request: Request) -> Response:
    run, jobs = run_of(request), request.app.state.jobs
    fields = await form(request)
    words = ["train", "--resume", str(run.path)]
    if fields.get("accept") == "yes":
        words.append("--accept-changes")
    await asyncio.to_thread(jobs.start, words, output=str(run.path))
    return seen(f"/runs/{request.path_params['run']}")


async def _note(request: Request) -> Response:
    fields = await form(request)
    await asyncio.to_thread(write_note, run_of(request), fields.get("note", ""))
    return seen(local(request.query_params.get("back", f"/runs/{request.path_params['run']}")))


async def _bin(request: Request) -> Response:
    """Move the runs of the form to the bin, each or none: one that trains is refused before."""
    folder: Folder = request.app.state.folder
    runs = [folder.run(name) for name in dict.fromkeys(await listed(request, "run"))]
    if not runs:
        raise RunError("no run is chosen", hint="choose the runs to move")
    for run in runs:
        folder.check_free(run)
    targets = [await asyncio.to_thread(folder.bin, run) for run in runs]
    return html(request, "binned.html", targets=targets)


async def _job(request: Request) -> Response:
    jobs: Jobs = request.app.state.jobs
    job = jobs.job(request.path_params["job"])
    folder: Folder = request.app.state.folder
    runs = {} if jobs.was_replaced(job) else folder.scan()
    run = next((name for name, run in runs.items() if str(run.path) == job.output), "")
    return html(request, "job.html", job=job, log=await asyncio.to_thread(jobs.log, job), run_id=run)


async def _stop_job(request: Request) -> Response:
    jobs: Jobs = request.app.state.jobs
    await asyncio.to_thread(jobs.stop, jobs.job(request.path_params["job"]))
    return seen(f"/jobs/{request.path_params['job']}")


async def _forget_job(request: Request) -> Response:
    jobs: Jobs = request.app.state.jobs
    job = jobs.job(request.path_params["job"])
    if not job.is_over:
        raise RunError("the command still runs", hint="stop it first")
    jobs.forget(job)
    return seen("/")


ROUTES = [
    Route("/", _home),
    Route("/list", _list),
    Route("/runs/{run}", _run),
    Route("/runs/{run}/live", _live),
    Route("/runs/{run}/stop", _stop, methods=["POST"]),
    Route("/runs/{run}/resume", _resume, methods=["POST"]),
    Route("/runs/{run}/note", _note, methods=["POST"]),
    Route("/bin", _bin, methods=["POST"]),
    Route("/jobs/{job}", _job),
    Route("/jobs/{job}/stop", _stop_job, methods=["POST"]),
    Route("/jobs/{job}/forget", _forget_job, methods=["POST"]),
]
