"""Hostile names: of files, folders, columns, keys and bases, with good content behind most of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from tests.hostile import adapters, models
from tests.hostile.case import Case, Place
from tests.hostile.foreign import NAMES, NASTY

LONG = bool(os.environ.get("LORAFIT_LONG"))
SOME = NAMES if LONG else NAMES[::5]
ALL_READERS = frozenset(
    {"train", "plan", "generate", "resume", "runs", "report", "put on", "continue", "check"}
)


def named(what: str, text: str, suffix: str = "") -> Callable[[Place], Path]:
    """A copy of the good rows, model or run under that name."""
    name = text.replace("\ud800", "")[:60] + suffix

    def make(place: Place) -> Path:
        if what == "rows":
            return place.file(name, place.rows.read_bytes())
        return place.copy(what, name)

    return make


def columns(texts: tuple[str, ...]) -> Callable[[Place], Path]:
    rows = [dict.fromkeys(texts, f"value {number}") for number in range(4)]
    return lambda place: place.file("rows.json", json.dumps(rows))


ROWS: dict[str, Case] = {
    **{f"named {text!a}": Case(named("rows", text, ".json"), harmless=ALL_READERS) for text in SOME},
    **{f"column {text!a}": Case(columns((text, "other")), harmless=ALL_READERS) for text in SOME},
    "columns of all names": Case(columns(NASTY)),
}
MODELS: dict[str, Case] = {
    **{f"named {text!a}": Case(named("model", text), harmless=ALL_READERS) for text in SOME},
    "keys of all names": Case(models.config(**dict.fromkeys(NASTY, 1)), harmless=ALL_READERS),
    "type of all names": Case(models.config(model_type="".join(NASTY))),
}
ADAPTERS: dict[str, Case] = {
    f"base {text!a}": Case(
        adapters.config(base_model_name_or_path=text), harmless=frozenset({"put on", "continue"})
    )
    for text in SOME
}
RUNS: dict[str, Case] = {f"named {text!a}": Case(named("run", text), harmless=ALL_READERS) for text in SOME}
