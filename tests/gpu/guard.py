"""A pytest plugin that makes `cuda` tensors possible without a GPU: `python -m pytest -p tests.gpu.guard FILE`.

It compiles cuda_guard.cpp for the installed torch and loads it. Torch looks up the hooks for CUDA once, so this must
come before torch: as a plugin it is imported before conftest.py.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("cuda_guard.cpp")


def compiler() -> str | None:
    """The C++ compiler, None if there is none."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def _compiled(torch_folder: Path) -> Path:
    """The library for the torch in this folder, from an earlier session or the compiler."""
    version = (torch_folder / "version.py").read_bytes()
    digest = hashlib.sha256(version + SOURCE.read_bytes() + str(torch_folder).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"lorafit-tests-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"cuda_guard-{digest}.so"
    if not library.exists():
        made = library.with_suffix(f".{os.getpid()}")
        command = [str(compiler()), "-std=c++20", "-O1", "-fPIC", "-shared", "-o", str(made), str(SOURCE)]
        links = [f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"]
        subprocess.run([*command, *links], check=True)
        made.replace(library)
    return library


def _load() -> ctypes.CDLL:
    assert "torch" not in sys.modules, "the guard has to be loaded before torch"
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    torch_folder = Path(spec.submodule_search_locations[0])
    library = _compiled(torch_folder)
    for name in ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_folder / "lib" / name), ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(library))


LIBRARY = _load()

import torch  # noqa: E402

LIBRARY.install_guard()  # before the first backward pass: autograd counts the devices once


def install() -> None:
    """Put the guard in the place of torch's own."""
    torch._C._ensureCUDADeviceGuardSet()
    LIBRARY.install_guard()
