"""The documentation site: every page is in it, every link works, and no page loads anything from the network."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
from tools import site

ROOT = Path(__file__).resolve().parents[2]

needs_zensical = pytest.mark.skipif(
    importlib.util.find_spec("zensical") is None, reason="needs zensical: pip install 'lorafit[docs]'"
)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the pages, of the files that they link to, and of the site's configuration."""
    site.copy_pages(ROOT, tmp_path)
    shutil.copyfile(ROOT / site.CONFIG, tmp_path / site.CONFIG)
    return tmp_path


def append(page: Path, text: str) -> None:
    page.write_text(f"{page.read_text(encoding='utf-8')}\n{text}\n", encoding="utf-8")


def test_pages_and_links_are_complete() -> None:
    assert site.problems(ROOT) == []


def test_a_dead_link_is_a_problem(copy: Path) -> None:
    append(copy / "docs/plan.md", "[a](nothing.md) [b](../recipes/nothing.yaml) [c](../..) `[d](code.md)`")
    assert site.problems(copy) == [
        "docs/plan.md: the link `nothing.md` leads to no file of the project",
        "docs/plan.md: the link `../recipes/nothing.yaml` leads to no file of the project",
        "docs/plan.md: the link `../..` leads to no file of the project",
    ]


def test_a_page_outside_the_site_is_a_problem(copy: Path) -> None:
    (copy / "other.md").write_text("# Other\n", encoding="utf-8")
    append(copy / "docs/plan.md", "[other](../other.md)")
    assert site.problems(copy) == ["docs/plan.md: the link `../other.md` leads to a page outside the site"]


def test_a_page_that_the_navigation_lacks_is_a_problem(copy: Path) -> None:
    (copy / "docs/new.md").write_text("# New\n", encoding="utf-8")
    assert site.problems(copy) == ["zensical.toml: the page `docs/new.md` is missing in `nav`"]


def test_a_missing_page_is_a_problem(copy: Path) -> None:
    (copy / "CHANGELOG.md").unlink()
    found = site.problems(copy)
    assert "zensical.toml: the page `CHANGELOG.md` does not exist" in found
    assert "README.md: the link `CHANGELOG.md` leads to no file of the project" in found


@needs_zensical
def test_it_builds_strictly_and_loads_nothing_from_the_network(tmp_path: Path) -> None:
    assert site.build(ROOT, tmp_path) == []
    built = tmp_path / "build/site"
    names = {"index.html" if page.name == "README.md" else f"{page.stem}.html" for page in site.pages(ROOT)}
    assert names <= {page.name for page in built.rglob("*.html")}
    assert {"recipes/default.yaml", "examples/colab.ipynb"} <= {
        file.relative_to(built).as_posix() for file in built.rglob("*")
    }
    for page in built.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert re.findall(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"?(?:https?:)?//", text) == []
    assert "held-out" in json.dumps(json.loads((built / "search.json").read_text(encoding="utf-8")))


@needs_zensical
def test_a_dead_anchor_fails_the_build(copy: Path, tmp_path: Path) -> None:
    append(copy / "docs/plan.md", "[text](check.md#nothing)")
    (found,) = site.build(copy, copy)
    assert "anchor does not exist" in found
