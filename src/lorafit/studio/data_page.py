"""The page of data: format and why, rows as the model reads them, search, verdicts with their rows, files by drop."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lorafit.config.load import load_form
from lorafit.config.schema import Config
from lorafit.errors import ConfigError, LorafitError
from lorafit.redact import shell
from lorafit.storage.atomic import make_folder
from lorafit.storage.safe_read import parse_json
from lorafit.studio.schema_form import overrides_of
from lorafit.studio.start import only_one
from lorafit.studio.web import html, number_in

PER_PAGE, MOST_OPEN, FIRST_SECONDS = 20, 4, 5.0
KEYS = (
    "model.name",
    "data.path",
    "data.format",
    "data.columns",
    "data.split",
    "data.template",
    "data.train_on",
)
UPLOADS = "uploads"
_FILE = re.compile(r"[\w][\w. -]{0,120}\.(json|jsonl|ndjson|csv|tsv|parquet|arrow|txt|md)(\.gz|\.zst)?")
_ID = re.compile(r"[0-9a-f]{32}")


def _config(query: Mapping[str, str]) -> Config:
    texts = {key: query[key] for key in KEYS if query.get(key)}
    texts.setdefault("model.name", "none")
    return load_form(*overrides_of(texts))


async def _data(request: Request) -> Response:
    query = request.query_params
    shown: dict[str, Any] = {"content": None, "problems": []}
    if query.get("data.path", "").strip():
        try:
            shown["content"] = await asyncio.to_thread(_content, request)
        except LorafitError as error:
            shown["problems"] = error.problems
    values = {key: query.get(key, "") for key in KEYS}
    return html(request, "data.html", values=values, query=query, formats=_formats(), **shown)


def _formats() -> list[str]:
    from lorafit.data.formats import FORMATS

    return ["auto", *FORMATS]


def _content(request: Request) -> dict[str, Any]:
    from lorafit.data.build import sources_of

    query, state = request.query_params, request.app.state
    config = _config(query)
    sources = sources_of(config)
    pages = _open_pages(state.row_pages, sources)
    first = max(0, int(number_in(query, "first", 1)) - 1)
    pages.wait(first + PER_PAGE, FIRST_SECONDS)
    found: list[int] | None = None
    if query.get("q", "").strip():
        pages.wait(2**60, FIRST_SECONDS)
        found = pages.search(query["q"].strip())
    elif query.get("rows"):
        found = [int(number) - 1 for number in re.findall(r"\d{1,12}", query["rows"])[:1000]]
    raw = pages.page(first, PER_PAGE) if found is None else pages.rows(found[first : first + PER_PAGE])
    return {
        "pages": pages,
        "layouts": [(sources.files[index].name, layout) for index, layout in sorted(pages.layouts.items())][
            :20
        ],
        "left_out": sources.left_out,
        "rows": _views(config, pages, raw),
        "has_model": config.model.name != "none",
        "found": found,
        "first": first,
        "total": pages.num_rows if found is None else len(found),
        "per_page": PER_PAGE,
    }


def _open_pages(known: OrderedDict[str, Any], sources: Any) -> Any:
    from lorafit.studio.row_pages import RowPages, digest_of

    key = digest_of(sources)
    if key not in known:
        known[key] = RowPages(sources)
    known.move_to_end(key)
    while len(known) > MOST_OPEN:
        known.popitem(last=False)
    return known[key]


def _views(config: Config, pages: Any, raw: list[Any]) -> list[dict[str, Any]]:
    """Each row with its text by the model where there is one, its fields, and what is wrong with it."""
    renderer = None
    if config.model.name != "none":
        from lorafit.data.build import make_renderer
        from lorafit.data.tokenizer import Tokenizer
        from lorafit.hub.client import tokenizer_folder

        model = config.model
        base = tokenizer_folder(model.name, revision=model.revision, offline=config.run.offline)
        renderer = make_renderer(config, Tokenizer.from_folder(base.path))
    views = []
    for row in raw:
        view: dict[str, Any] = {
            "number": row.number + 1,
            "place": row.place,
            "view": None,
            "problem": "",
            "fields": [],
        }
        value = {} if row.fault else parse_json(row.text)
        view["fields"] = list(value.items())[:50] if isinstance(value, dict) else [("", value)]
        try:
            read = pages.row(row)
            if renderer is not None:
                from lorafit.data.row_preview import view_row

                view["view"] = view_row(renderer, read)
        except LorafitError as error:
            view["problem"] = str(error.problems[0].message)
        views.append(view)
    return views


async def _check(request: Request) -> Response:
    """The verdicts of `lorafit check`, in a process of its own, each with a link to its rows."""
    query = request.query_params
    words = ["check", "--data-only", "--json"]
    config = _config(query)
    parsed, taken = overrides_of({key: query[key] for key in KEYS if query.get(key)})
    words += [f"{key}={text}" for key, text in parsed.items()]
    for path in config.data.path:
        words += ["--data", path]
    if query.get("model.name"):
        words += ["--model", config.model.name]
    words += [f"{key}={text}" for key, text in taken.items() if key not in ("data.path", "model.name")]
    _, text = await only_one(request, "check", words)
    line = next((line for line in text.splitlines() if line.startswith("{")), "")
    try:
        checked = parse_json(line)
        verdicts, ledger = checked["verdicts"], checked.get("ledger")
    except (ValueError, KeyError, TypeError):
        return html(request, "plan.html", code=2, text=text)
    command = shell("lorafit", *(word for word in words if word != "--json"))
    return html(request, "verdicts.html", verdicts=verdicts, ledger=ledger, command=command, query=query)


async def _upload(request: Request) -> Response:
    """A part of a dropped file. The last part gives it its name below the folder; no file is replaced."""
    query = request.query_params
    name, part = query.get("name", ""), query.get("id", "")
    if not _FILE.fullmatch(name) or not _ID.fullmatch(part):
        raise ConfigError("this is no file of rows", hint="json, jsonl, csv, tsv, parquet, arrow or txt")
    folder: Path = request.app.state.folder.path / UPLOADS
    body, is_last = await request.body(), query.get("last") == "1"

    def write() -> Path:
        make_folder(folder)
        file = folder / f".part-{part}"
        with file.open("ab" if query.get("offset", "0") != "0" else "xb") as writing:
            if str(writing.tell()) != query.get("offset", "0"):
                raise ConfigError("a part of the file is missing", hint="drop it again")
            writing.write(body)
        if is_last:
            free = folder / name
            if free.exists():
                free = folder / f"{secrets.token_hex(3)}-{name}"
            file.rename(free)
            return free
        return file

    try:
        path = await asyncio.to_thread(write)
    except OSError as error:
        raise LorafitError(f"cannot write the file: {error.strerror or error}", place=str(folder)) from None
    return JSONResponse({"path": str(path)})


ROUTES = [
    Route("/data", _data),
    Route("/data/check", _check),
    Route("/data/upload", _upload, methods=["POST"]),
]
