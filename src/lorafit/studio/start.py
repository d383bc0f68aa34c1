"""The page of a new run: a form of every key, what is wrong at its field, the recipe, the command, the plan."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from starlette.datastructures import State
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lorafit.config.load import load_config, load_form, recipe_file, recipes_folder
from lorafit.config.schema import Config, keys
from lorafit.errors import ConfigError, Problem
from lorafit.redact import printable, redact, shell
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import make_folder, run_error, write_file
from lorafit.storage.safe_read import read_text
from lorafit.studio.folder import Folder
from lorafit.studio.schema_form import changed_texts, form_fields, overrides_of, texts_of
from lorafit.studio.web import Fields, form, html, seen

NAME = "name"  # the field of the run's name
OWN_NAMES = ("recipes", "uploads", "tasks.jsonl")  # of the studio, in the folder of the runs
_NAME = re.compile(r"[\w][\w.-]{0,99}")
_KEY = re.compile(r"`([a-z]+\.[a-z_0-9]+)`")
PLAN_SECONDS = 600.0
WORDS = (sys.executable, "-m", "lorafit")
_MAX_RECIPE = 100_000


def demo_folder() -> Path | None:
    """The folder with the model, rows and recipe of the demo: in the package when installed, else in the checkout."""
    package = Path(__file__).parents[1]
    found = (folder / "demo" for folder in (package, package.parents[1]))
    return next((folder for folder in found if (folder / "recipe.yaml").is_file()), None)


def demo_texts() -> Fields:
    """The form of the demo run. Raises ConfigError where the demo is not installed."""
    folder = demo_folder()
    if folder is None:
        raise ConfigError("the demo is not installed", hint="it is in lorafit's repository, in `demo/`")
    texts = texts_of(yaml.safe_load((folder / "recipe.yaml").read_text("utf-8")))
    return {
        **texts,
        "model.name": str(folder / "model"),
        "data.path": str(folder / "rows.json"),
        NAME: "demo",
    }


def _prefilled(request: Request) -> Fields:
    query, folder = request.query_params, request.app.state.folder
    if "demo" in query:
        texts = demo_texts()
    elif "from" in query:
        run: RunDirectory = folder.run(query["from"])
        texts = {**changed_texts(run.config()), NAME: f"{run.path.name}-again"}
    elif "job" in query:
        job = request.app.state.jobs.job(query["job"])
        texts = {**changed_texts(load_config(job.recipe)), NAME: Path(job.output).name}
    elif query.get("recipe"):
        if query["recipe"] not in _recipes():
            raise ConfigError(f"there is no recipe `{query['recipe']}`")
        texts = texts_of(yaml.safe_load(read_text(recipe_file(query["recipe"]), _MAX_RECIPE)))
    else:
        texts = {}
    for key in ("model.name", "data.path"):
        if query.get(key):
            texts[key] = query[key]
    return {**texts, NAME: _free_name(request.app.state, texts.get(NAME, ""))}


def _recipes() -> list[str]:
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def _is_taken(name: str, state: State) -> bool:
    """Whether a run or a file has this name, or will have."""
    path = state.folder.path / name
    is_ordered = any(job.output == str(path) and not job.is_over for job in state.jobs.listed())
    return is_ordered or name in OWN_NAMES or path.exists()


def _free_name(state: State, wanted: str) -> str:
    """`wanted`, or the time, with a number where that name is taken."""
    first = wanted or f"run-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (first if number == 1 else f"{first}-{number}" for number in range(1, 10_000))
    return next(name for name in names if not _is_taken(name, state))


def _parts(name: str, folder: Folder) -> tuple[Path, Path]:
    """(run directory, recipe file) of a name."""
    return folder.path / name, folder.path / "recipes" / f"{name}.yaml"


def _checked(texts: Mapping[str, str], state: State) -> tuple[Config | None, list[tuple[str, Problem]]]:
    """The config of the form and (key, problem) of what is wrong, "" for what belongs to no field."""
    problems: list[tuple[str, Problem]] = []
    name = texts.get(NAME, "").strip()
    if not _NAME.fullmatch(name):
        problems.append((NAME, Problem("a name has letters, digits, `-`, `_` and `.`")))
    elif _is_taken(name, state):
        problems.append((NAME, Problem(f"`{name}` exists already", hint="choose another name")))
    config, output = None, state.folder.path / ("NAME" if problems else name)
    parsed, taken = overrides_of(texts)
    try:
        config = load_form(parsed, {**taken, "run.output": str(output)})
    except ConfigError as error:
        for problem in error.problems:
            match = _KEY.search(problem.message)
            problems.append((problem.place or (match[1] if match else ""), problem))
    return (None if problems else config), problems


def _recipe_text(texts: Mapping[str, str], config: Config | None) -> str:
    """The recipe: the keys that the form sets, as YAML."""
    if config is None:
        return ""
    values = config.model_dump(mode="json", exclude_unset=True)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _outcome(texts: Mapping[str, str], state: State) -> dict[str, Any]:
    config, problems = _checked(texts, state)
    recipe = _parts(texts.get(NAME, "").strip() or "NAME", state.folder)[1]
    return {
        "errors": [(key, problem.message, problem.hint) for key, problem in problems],
        "recipe": _recipe_text(texts, config),
        "command": shell("lorafit", "train", recipe) if config else "",
    }


async def _new(request: Request) -> Response:
    return await _page(request, _prefilled(request))


async def _page(
    request: Request, texts: Fields, status: int = 200, *, with_problems: bool = False
) -> Response:
    outcome = _outcome(texts, request.app.state) if with_problems or texts.get("model.name") else None
    return html(
        request,
        "new.html",
        status=status,
        groups=form_fields(),
        texts=texts,
        recipes=_recipes(),
        outcome=outcome or {"errors": [], "recipe": "", "command": ""},
        has_demo=demo_folder() is not None,
    )


async def _check(request: Request) -> Response:
    return JSONResponse(_outcome(await form(request), request.app.state))


async def _start(request: Request) -> Response:
    texts, folder, jobs = await form(request), request.app.state.folder, request.app.state.jobs
    config, problems = _checked(texts, request.app.state)
    if problems or config is None:
        return await _page(request, texts, 422, with_problems=True)
    run, recipe = _parts(texts[NAME].strip(), folder)
    with run_error("cannot write the recipe", recipe):
        await asyncio.to_thread(make_folder, recipe.parent)
    write_file(recipe, _recipe_text(texts, config))
    if plan := request.app.state.processes.get("plan"):
        await end(plan)  # it would take the run's processor time
    waits = texts.get("act") == "queue"
    job = await asyncio.to_thread(jobs.start, ["train", str(recipe)], output=str(run), waits=waits)
    return seen("/" if waits else f"/jobs/{job.id}")


async def _plan(request: Request) -> Response:
    """What `lorafit plan` prints for the form, in a process of its own: it needs torch."""
    texts = await form(request)
    config, problems = _checked(texts, request.app.state)
    if config is None:
        return html(request, "problem_list.html", problems=[problem for _, problem in problems])
    recipe = request.app.state.jobs.path / "plan.yaml"
    write_file(recipe, _recipe_text(texts, config))
    code, text = await only_one(request, "plan", ["plan", str(recipe)])
    named = re.search(r"\b[a-z]+\.[a-z_0-9]+\b(?==)", text) if code else None
    key = named[0] if named and named[0] in keys() else ""
    return html(request, "plan.html", code=code, text=text, key=key)


async def _models(request: Request) -> Response:
    """The table of `lorafit models`, which is measured once."""
    state = request.app.state
    if state.models is None:
        code, text = await only_one(request, "models", ["models", "--json"])
        if code:
            return html(request, "plan.html", code=code, text=text)
        state.models = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return html(request, "models.html", models=state.models)


async def only_one(request: Request, kind: str, words: list[str]) -> tuple[int, str]:
    """(exit code, output) of a command. Its process ends with a later request of the same `kind`, and with its page."""
    running: dict[str, asyncio.subprocess.Process] = request.app.state.processes
    if (earlier := running.get(kind)) is not None:
        await end(earlier)
    process = await asyncio.create_subprocess_exec(
        *WORDS,
        *words,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "100"},
    )
    running[kind] = process
    printed, left = asyncio.create_task(process.communicate()), asyncio.create_task(_left(request))
    try:
        await asyncio.wait({printed, left}, timeout=PLAN_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if not printed.done() and not left.done():
            raise ConfigError("the command took too long")
    finally:
        left.cancel()
        await end(process)
    output, _ = await printed
    return process.returncode or 0, redact(printable(output.decode(errors="replace")))


async def _left(request: Request) -> None:
    """Return when nobody waits for the reply any more."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def end(process: asyncio.subprocess.Process) -> None:
    """End a process that has not ended."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


ROUTES = [
    Route("/new", _new),
    Route("/new", _start, methods=["POST"]),
    Route("/new/check", _check, methods=["POST"]),
    Route("/new/plan", _plan, methods=["POST"]),
    Route("/new/models", _models),
]
