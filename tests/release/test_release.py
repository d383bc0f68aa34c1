"""`make release`: the version and the changelog change together, or nothing changes and every reason is given."""

from __future__ import annotations

import subprocess
from datetime import date
from pathlib import Path

import pytest
from packaging.version import Version
from tools.release import ROOT, UNRELEASED, prepare

pytest.importorskip("hatchling", reason="the build backend is missing: pip install '.[test]'")

DAY = date(2026, 11, 30)
PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "toy"
dynamic = ["version"]
[tool.hatch.version]
path = "version.py"
"""
CHANGELOG = """\
# Changelog

## [Unreleased]

### Added

- A thing.

## [0.1.0] - 2026-01-31

- The first.
"""


def git(root: Path, *words: str) -> None:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.com", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *words], cwd=root, check=True, capture_output=True)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A small project with version 0.1.0 released, and one entry since."""
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    (tmp_path / "version.py").write_text('__version__ = "0.1.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    git(tmp_path, "init", "-q")
    return commit(tmp_path)


def commit(root: Path) -> Path:
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "x")
    return root


def files(root: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in root.iterdir() if path.is_file()}


def test_version_and_changelog_change_and_nothing_else(clone: Path) -> None:
    before = files(clone)
    assert prepare(clone, "0.2.0", DAY) == []
    moved = CHANGELOG.replace(UNRELEASED, f"{UNRELEASED}\n## [0.2.0] - 2026-11-30\n")
    assert files(clone) == before | {"version.py": '__version__ = "0.2.0"\n', "CHANGELOG.md": moved}


def test_a_version_that_the_code_has_and_nobody_released_can_be_released(clone: Path) -> None:
    (clone / "version.py").write_text('__version__ = "0.2.0"\n')
    commit(clone)
    assert prepare(clone, "0.2.0", DAY) == []
    assert (clone / "version.py").read_text() == '__version__ = "0.2.0"\n'
    assert "## [0.2.0] - 2026-11-30\n" in (clone / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("0.1.0", "0.1.0 is not greater than 0.1.0, the newest version in CHANGELOG.md"),
        ("0.0.9", "0.0.9 is not greater than 0.1.0, the newest version in CHANGELOG.md"),
        ("v0.2.0", "`v0.2.0` is spelled `0.2.0` in PEP 440"),
        ("minor", "`minor` is not a version: give one such as 0.2.0"),
    ],
)
def test_a_version_that_does_not_follow_is_refused(clone: Path, version: str, reason: str) -> None:
    before = files(clone)
    assert prepare(clone, version, DAY) == [reason]
    assert files(clone) == before


def test_a_version_below_that_of_the_code_is_refused(clone: Path) -> None:
    (clone / "version.py").write_text('__version__ = "0.2.0.dev3"\n')
    commit(clone)
    reason = "0.1.1 is less than 0.2.0.dev3, the version of the code"
    assert prepare(clone, "0.1.1", DAY) == [reason]


def test_every_reason_is_given_at_once_and_nothing_changes(clone: Path) -> None:
    (clone / "CHANGELOG.md").write_text(CHANGELOG.replace("- A thing.\n", ""))
    before = files(clone)
    problems = prepare(clone, "0.1.0", DAY)
    assert [problem.partition(":")[0] for problem in problems] == [
        "0.1.0 is not greater than 0.1.0, the newest version in CHANGELOG.md",
        "CHANGELOG.md has no entry (`- ...`) below `## [Unreleased]`",
        "the working tree is not clean, commit or stash first",
    ]
    assert "CHANGELOG.md" in problems[-1]
    assert files(clone) == before


def test_a_changelog_without_the_section_is_refused(clone: Path) -> None:
    (clone / "CHANGELOG.md").write_text(CHANGELOG.replace(UNRELEASED, ""))
    commit(clone)
    assert prepare(clone, "0.2.0", DAY) == ["CHANGELOG.md needs one line `## [Unreleased]`, and has 0"]


def test_this_project_can_be_released() -> None:
    import lorafit

    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert text.count(UNRELEASED) == 1
    assert str(Version(lorafit.__version__)) == lorafit.__version__
