"""The extras of pyproject.toml, of the documentation and of the program's hints are the same names."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from lorafit.config.schema import RunSection

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = set(PROJECT["optional-dependencies"])
FOR_DEVELOPMENT = {"test", "bench", "docs", "dev"}
PLACES = ("*.md", "docs/*.md", "src/**/*.py", "examples/**/*", "benchmarks/*.py", "Makefile", "Dockerfile")


def named_extras() -> Iterator[tuple[str, str]]:
    """Every extra that a page, a hint or a script asks pip for, with its file."""
    for file in sorted(path for pattern in PLACES for path in ROOT.glob(pattern) if path.is_file()):
        text = file.read_text(encoding="utf-8")
        for found in re.findall(
            r"(?:lorafit|['\"]\.)\[([a-z0-9,-]+)\]|^ARG EXTRAS=(\S+)$", text, re.MULTILINE
        ):
            for name in "".join(found).split(","):
                yield file.relative_to(ROOT).as_posix(), name


def test_every_extra_that_is_named_exists() -> None:
    named = list(named_extras())
    assert {file for file, _ in named} >= {"docs/install.md", "docs/export.md", "Makefile", "Dockerfile"}
    assert [(file, name) for file, name in named if name not in EXTRAS] == []


def test_the_page_explains_every_extra_of_a_user() -> None:
    page = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    section = page.partition("\n## Extras\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    explained = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert sorted(explained) == sorted(EXTRAS - FOR_DEVELOPMENT)
    assert all(f"`{name}`" in section for name in FOR_DEVELOPMENT)


def test_every_tracker_is_an_extra() -> None:
    (choices, _) = get_args(RunSection.model_fields["trackers"].annotation)
    assert set(get_args(choices)) <= EXTRAS


def test_tests_have_what_users_get_where_it_installs_everywhere() -> None:
    optional = PROJECT["optional-dependencies"]
    for extra in ("gpu", "nf4", "verify", "eval", "gguf", "tensorboard"):
        assert set(optional[extra]) <= set(optional["test"]), extra
