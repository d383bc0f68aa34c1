"""The property tests draw the same examples in every process, and others with another seed, which a failure names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
TESTS = """
import os
from hypothesis import given, strategies as st
{imports}

@given(st.text() | st.integers() | st.floats() | st.binary())
def test_drawn(drawn):
    with open(os.environ["DRAWN"], "a") as file:
        file.write(repr(drawn) + "\\n")

@given(st.integers())
def test_fails(number):
    assert number < 1000
"""


def session(folder: Path, *options: str, imports: str = "", **environment: str) -> tuple[str, str]:
    """What a property test under this suite's conftest draws, and what pytest prints."""
    folder.mkdir()
    (folder / "conftest.py").write_text("from tests.conftest import *")
    (folder / "test_drawn.py").write_text(TESTS.format(imports=imports))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-c",
            "pyproject.toml",
            "-p",
            "no:cacheprovider",
            *options,
            str(folder),
        ],
        env={**os.environ, "CI": "", "DRAWN": str(folder / "log"), **environment},
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout
    assert "number=1000" in done.stdout
    assert "@reproduce_failure(" in done.stdout
    return (folder / "log").read_text(), done.stdout


@pytest.mark.slow
def test_examples_depend_on_nothing_but_the_seed_and_a_failure_says_how_to_repeat_it(tmp_path: Path) -> None:
    fixed, said = session(tmp_path / "a")
    assert "python -m pytest '" in said
    assert session(tmp_path / "b", imports="import lorafit.config.load", CI="true")[0] == fixed
    other, said = session(tmp_path / "c", "--hypothesis-seed=7")
    assert "python -m pytest --hypothesis-seed=7 '" in said
    assert other != fixed
    assert session(tmp_path / "d", "--hypothesis-seed=7", imports="import lorafit.report.page")[0] == other
