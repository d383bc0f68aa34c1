"""The texts of the pages are in one table per language: the same keys, the same values in them, and none unused."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from pathlib import Path

import pytest

import lorafit.studio
from lorafit.config.guide import GUIDE
from lorafit.config.schema import keys
from lorafit.studio.schema_form import FIRST
from lorafit.studio.texts import LANGUAGES, chosen, table

FOLDER = Path(lorafit.studio.__file__).parent
REPORT = FOLDER.parent / "report"


def values_of(text: str) -> list[str]:
    return sorted(name for _, name, _, _ in string.Formatter().parse(text) if name is not None)


def test_all_languages_have_the_same_keys_and_values() -> None:
    tables = {language: table(language) for language in LANGUAGES}
    assert list(tables) == ["en", "ko"]
    for language, texts in tables.items():
        assert texts.keys() - of_schema(texts) == tables["en"].keys() - of_schema(tables["en"]), language
        for key, text in texts.items():
            assert text.strip(), (language, key)
            assert values_of(text) == values_of(tables["en"].get(key, key)) or key in of_schema(texts), (
                language,
                key,
            )


def of_schema(texts: Mapping[str, str]) -> set[str]:
    """The texts about keys of the schema. Where one is missing, the page has the schema's own."""
    return {key for key in texts if key.startswith(("help ", "usual ", "field "))}


def test_the_keys_that_matter_first_have_their_texts_in_each_language() -> None:
    for language in LANGUAGES:
        texts = table(language)
        known = {name.partition(" ")[2] for name in of_schema(texts)}
        assert known <= set(keys()), language
        assert {f"field {key}" for key in FIRST} <= of_schema(texts)
    assert {f"help {key}" for key in FIRST} | {f"usual {key}" for key in GUIDE} <= of_schema(table("ko"))


def test_every_text_that_a_page_asks_for_exists_and_each_is_asked_for() -> None:
    pages = "".join(path.read_text("utf-8") for path in FOLDER.rglob("*.html"))
    pages += "".join(path.read_text("utf-8") for path in FOLDER.glob("*.py"))
    whole = set(re.findall(r'\bt(?:ext_of)?\((?:request, )?"([a-z][\w. ]*)"[),]', pages)) | set(
        re.findall(r'"(nav\.\w+)"', pages)
    )
    starts = set(re.findall(r't\("([\w.]+\.)" ~', pages))
    listed = {key for key in table("en") if not key.startswith("= ")} - of_schema(table("en"))
    assert whole - listed == set()
    assert {key for key in listed - whole if not key.startswith(tuple(starts))} == set()


def test_names_of_the_report_are_translated() -> None:
    """What a template of the report translates in so many words is in the table."""
    template = (REPORT / "templates/sections.html").read_text("utf-8")
    named = re.findall(r'_\("([^"]+)"\)', template)
    assert len(named) > 15
    assert [name for name in named if f"= {name}" not in table("ko")] == []
    python = (REPORT / "sections.py").read_text("utf-8") + (REPORT / "page.py").read_text("utf-8")
    python += (FOLDER / "compare.py").read_text("utf-8")
    assert [
        key for key in table("ko") if key.startswith("= ") and key[2:] not in template + python + STATES
    ] == []


STATES = """running finished ended early interrupted stopped unreadable
model model type size train int8 GGUF fits memory 1,000 rows"""


@pytest.mark.parametrize(
    ("cookie", "accepts", "language"),
    [
        ("", "", "en"),
        ("", "ko-KR,ko;q=0.9,en;q=0.8", "ko"),
        ("en", "ko", "en"),
        ("ko", "", "ko"),
        ("xx", "fr, ko", "ko"),
    ],
)
def test_the_language_is_that_of_the_cookie_or_the_browser(cookie: str, accepts: str, language: str) -> None:
    assert chosen(cookie, accepts) == language
