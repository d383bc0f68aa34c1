"""Every page of the studio that shows a file which somebody else may have written. In the server of this folder.

A page shows, or says what is wrong; an error of ours ends the process with its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.studio.pages import Studio


def main() -> None:
    """`studio KIND IT [MODEL ROWS]`: ask for all pages of a file or folder of this kind."""
    kind, it, *others = sys.argv[2:]
    for name, path, query in [*PAGES[kind](Path(it), *others)]:
        reply = Studio(Path(name)).ask(path, params=query)
        if reply.status_code not in (200, 400):
            raise AssertionError(f"{path} {query}: {reply.status_code}")
    sys.exit(0)


def _of_run(it: Path, *_: str) -> list[tuple[str, str, Mapping[str, Any]]]:
    folder = str(it.parent)
    ids = list(Studio(it.parent).ids().values())
    asked: list[tuple[str, str, Mapping[str, Any]]] = [(folder, path, {}) for path in ("/", "/list", "/talk")]
    for name in ids:
        asked += [
            (folder, f"/runs/{name}{suffix}", {"smooth": "much"}) for suffix in ("", "/live", "/export")
        ]
        asked += [(folder, "/new", {"from": name})]
    return [*asked, (folder, "/compare", {"run": ids * 3})]


def _of_rows(it: str | Path, model: str, *_: str, **more: str) -> list[tuple[str, str, Mapping[str, Any]]]:
    query = {"data.path": str(it), "model.name": model, **more}
    views: list[Mapping[str, str]] = [{}, {"q": "a"}, {"rows": "1,2,99999999999"}, {"first": "3"}]
    return [("runs", "/data", {**query, **view}) for view in views]


PAGES: Mapping[str, Any] = {
    "run": _of_run,
    "data": _of_rows,
    "model": lambda it, _, rows: _of_rows(rows, str(it)),
    "template": lambda it, model, rows: _of_rows(rows, model, **{"data.template": str(it)}),
}
