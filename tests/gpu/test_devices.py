"""The CUDA path on a machine without a GPU: a fake and a simulated device, each in a process of its own.

Autograd asks for the hooks of CUDA once, so they are loaded before torch: tests/gpu/guard.py is a plugin of the pytest
that runs the files `on_*.py`. One of them alone:
`python -m pytest -p tests.gpu.guard -p tests.gpu.fake tests/gpu/on_fake.py`.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IS_LONG = bool(os.environ.get("LORAFIT_LONG"))
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")),
    reason="needs Linux and a C++ compiler",
)


@pytest.mark.parametrize("file", sorted(path.name for path in Path(__file__).parent.glob("on_*.py")))
@pytest.mark.parametrize(
    "marks",
    [
        pytest.param("not slow", marks=pytest.mark.slow),
        pytest.param(
            "slow",
            marks=[pytest.mark.slow, pytest.mark.skipif(not IS_LONG, reason="`make gpu-fake` runs it")],
        ),
    ],
)
def test_on_a_device_without_a_gpu(file: str, marks: str) -> None:
    device = file.removeprefix("on_").removesuffix(".py")
    if device == "interpreted" and importlib.util.find_spec("triton") is None:
        pytest.skip("needs the package triton")
    plugins = ["-p", "tests.gpu.guard", "-p", f"tests.gpu.{device}"]
    command = [sys.executable, "-m", "pytest", *plugins, f"tests/gpu/{file}", "-m", marks]
    done = subprocess.run(
        [*command, "-p", "no:randomly"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != pytest.ExitCode.NO_TESTS_COLLECTED:
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
