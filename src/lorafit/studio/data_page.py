"""The page of data: format and why, rows as the model reads them, search, verdicts with their rows, files by drop."""

from __future__ import annotations

import asyncio
import json
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
from lorafit.hub.dataset_splits import KNOWN_FILES, suffix_of
from lorafit.redact import shell
from lorafit.storage.atomic import make_folder
from lorafit.storage.safe_read import parse_json
from lorafit.studio.schema_form import field_of, overrides_of
from lorafit.studio.start import only_one
from lorafit.studio.web import html, number_in

PER_PAGE, MOST_OPEN, FIRST_SECONDS = 20, 4, 5.0
KEYS = (  # after the format, fields of the form as they are
    "model.name",
    "data.path",
    "data.format",
    "data.columns",
    "data.split",
    "data.template",
    "data.train_on",
    "train.method",
)
UPLOADS = "uploads"
_FILE = re.compile(r"[^/\\\0-\x1f\x7f]{1,200}")
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
    fields = [field_of(key) for key in KEYS[3:]]
    return html(request, "data.html", values=values, query=query, formats=_formats(), fields=fields, **shown)


def _formats() -> list[str]:
    from lorafit.data.formats import FORMATS

    return ["auto", *FORMATS]


def _content(request: Request) -> dict[str, Any]:
    from lorafit.data.build import sources_of
    from lorafit.data.columns import TEXT_FIELDS
    from lorafit.data.row_fields import CONVERSATIONS

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
    rows = _views(config, pages, raw)
    return {
        "pages": pages,
        "layouts": [(sources.files[index].name, layout) for index, layout in sorted(pages.layouts.items())][
            :20
        ],
        "left_out": sources.left_out,
        "rows": rows,
        "columns": list(dict.fromkeys(name for row in rows for name, _ in row["fields"] if name))[:50],
        "by_hand": config.data.columns,
        "fields": (*TEXT_FIELDS, *CONVERSATIONS[:1], "chosen", "rejected"),
        "has_model": config.model.name != "none",
        "found": found,
        "first": first,
        "total": pages.num_rows if found is None else len(found),
        "per_page": PER_PAGE,
    }


def _open_pages(known: OrderedDict[str, Any], sources: Any) -> Any:
    from lorafit.studio.row_pages import RowPages, digest_of

    key = digest_of(sources)
    if key not in known or not known[key].path.is_dir():
        known[key] = RowPages(sources)
    known.move_to_end(key)
    while len(known) > MOST_OPEN:
        known.popitem(last=False)
    return known[key]


def _views(config: Config, pages: Any, raw: list[Any]) -> list[dict[str, Any]]:
    """Each row with its text by the model where there is one, its turns, its fields, and what is wrong with it."""
    from lorafit.studio.row_turns import is_divided, turns_of

    renderer = None
    if config.model.name != "none":
        from lorafit.data.build import make_renderer
        from lorafit.data.tokenizer import Tokenizer
        from lorafit.hub.client import tokenizer_folder

        model = config.model
        base = tokenizer_folder(model.name, revision=model.revision, offline=config.run.offline)
        renderer = make_renderer(config, Tokenizer.from_folder(base.path))
    views: list[dict[str, Any]] = []
    for row in raw:
        views.append(
            view := {
                "number": row.number + 1,
                "place": row.place,
                "view": None,
                "problem": "",
                "fields": _fields(row),
                "turns": [],
                "is_divided": False,
            }
        )
        try:
            if row.file not in pages.layouts and not row.fault:
                continue  # the page says why it has no layout
            read = pages.row(row)
            view["turns"] = turns_of(read.content)
            view["is_divided"] = is_divided(view["turns"])
            if renderer is not None:
                from lorafit.data.row_preview import view_row

                view["view"] = view_row(renderer, read)
        except LorafitError as error:
            view["problem"] = str(error.problems[0].message)
    return views


def _fields(row: Any) -> list[tuple[str, str]]:
    """The fields of a raw row, texts as they are and the rest as JSON."""
    value = {} if row.fault else parse_json(row.text)
    pairs = list(value.items())[:50] if isinstance(value, dict) else [("", value)]
    return [
        (name, item if isinstance(item, str) else json.dumps(item, ensure_ascii=False))
        for name, item in pairs
    ]


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
        verdicts, shown = checked["verdicts"], _account(checked)
    except (ValueError, KeyError, TypeError):
        return html(request, "plan.html", code=2, text=text)
    command = shell("lorafit", *(word for word in words if word != "--json"))
    return html(request, "verdicts.html", verdicts=verdicts, account=shown, command=command, query=query)


def _account(checked: Mapping[str, Any]) -> Any:
    """The ledger and the lengths of checked rows as the report shows them, None without a model."""
    from lorafit.data.ledger import Ledger
    from lorafit.report.sections import account

    ledger = checked.get("ledger")
    return account(Ledger.from_json(ledger) if ledger else None, checked.get("lengths"))


async def _upload(request: Request) -> Response:
    """A part of a dropped file. The last part gives it its name below the folder; no file is replaced."""
    query = request.query_params
    name, part = query.get("name", ""), query.get("id", "")
    if not suffix_of(name) or not _FILE.fullmatch(name) or not _ID.fullmatch(part):
        raise ConfigError(f"`{name}` is no data file", hint=f"data files end in {KNOWN_FILES}")
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
