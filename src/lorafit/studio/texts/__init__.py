"""The texts of the pages: one table per language, en.json and ko.json beside this file, with the same keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

LANGUAGES = {"en": "English", "ko": "한국어"}


@cache
def table(language: str) -> Mapping[str, str]:
    """The texts of a language by key. Names of a report's charts and tables are keys as they stand."""
    texts: dict[str, str] = json.loads((Path(__file__).parent / f"{language}.json").read_text("utf-8"))
    return texts


def chosen(cookie: str, accepts: str) -> str:
    """The language of a request: that of its cookie, else the first that its browser accepts, else English."""
    if cookie in LANGUAGES:
        return cookie
    asked = (part.split(";")[0].strip().lower()[:2] for part in accepts.split(","))
    return next((name for name in asked if name in LANGUAGES), "en")
