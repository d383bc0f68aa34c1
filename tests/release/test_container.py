"""The Dockerfile, as far as that can be known without a container engine: no test builds the image."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.waiting import HANGS

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def instructions(name: str) -> list[str]:
    """What follows each instruction `name`."""
    return re.findall(rf"^{name} (.*)$", TEXT, re.MULTILINE)


def test_the_linter_accepts_it() -> None:
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint is missing: pip install '.[dev]'")
    command = [hadolint, "--no-color", "--failure-threshold", "style", "Dockerfile"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_base_is_pinned_and_the_user_is_not_root() -> None:
    bases = {line.split()[0] for line in instructions("FROM")}
    assert len(bases) == 1
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", bases.pop())
    assert instructions("USER") == ["${UID}"]
    assert "UID=1000" in instructions("ARG")


def test_it_starts_lorafit_with_its_caches_in_the_volume_and_a_compiler() -> None:
    assert instructions("ENTRYPOINT") == ['["lorafit"]']
    assert instructions("VOLUME") == ["/cache"]
    assert {"LORAFIT_CACHE=/cache/lorafit", "HF_HOME=/cache/huggingface"} <= set(TEXT.split())
    assert re.search(r"apt-get install .* g\+\+", TEXT)


def test_the_build_context_is_what_the_wheel_needs_and_no_more(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="the build backend is missing: pip install '.[test]'")
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    allowed = [rule.removeprefix("!") for rule in rules[1:-1]]
    assert rules == ["*", *(f"!{name}" for name in allowed), "**/__pycache__"]
    for name in allowed:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d"]
    wheels = []
    for tree in (ROOT, tmp_path):
        subprocess.run(
            [*build, tmp_path / tree.name], cwd=tree, check=True, capture_output=True, timeout=HANGS
        )
        (wheel,) = (tmp_path / tree.name).iterdir()
        wheels.append(wheel.read_bytes())
    assert wheels[0] == wheels[1]
