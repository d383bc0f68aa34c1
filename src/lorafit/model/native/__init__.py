"""The CPU kernels: compiled once on this machine with its own C++ compiler, cached, and called through ctypes.

Nothing but speed depends on them: model/kernels.py holds the same mathematics in torch, which runs where there is
no compiler. Results do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from lorafit.durable import cache_folder

_SOURCES = ("rows.cpp", "attention.cpp", "few_rows.cpp", "decode.cpp", "int8.cpp")
_HEADERS = ("common.h", "tiles.h", "attention_tiles.h")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
_X86_FLAGS = (
    "-mprefer-vector-width=512",
)  # where there are such vectors; the compiler would take half of one
_SUFFIX = {torch.float32: "_f32", torch.bfloat16: "_bf16"}


class Kernels:
    """The compiled functions. A tensor is passed by its memory: contiguous, on the CPU, float32 or bfloat16."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        granted = ctypes.c_int64(0)
        library.has_tiles(ctypes.byref(granted), ctypes.c_int(1))
        self.has_tiles = bool(granted.value)
        """Whether the processor multiplies matrix tiles and the system lets this process use them."""

    def call(self, name: str, dtype: torch.dtype, *arguments: Tensor | int | float | None) -> None:
        """Run the kernel `name` of `dtype` on all of torch's threads. Scalars are int64 or float32."""
        getattr(self._library, name + _SUFFIX[dtype])(
            *(_as_c(argument) for argument in arguments), ctypes.c_int(torch.get_num_threads())
        )


def fits(*tensors: Tensor) -> bool:
    """Whether the kernels can work on these tensors."""
    return all(t.device.type == "cpu" and t.dtype in _SUFFIX for t in tensors) and kernels() is not None


def kernels() -> Kernels | None:
    """The kernels of this machine, compiled at the first call; None where they cannot be had."""
    return _build()[0]


def missing() -> str:
    """Why there are no kernels here; "" where there are."""
    return _build()[1]


@functools.cache
def _build() -> tuple[Kernels | None, str]:
    if os.environ.get("LORAFIT_NATIVE") == "0":
        return None, "LORAFIT_NATIVE=0"
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if not compiler:
        return None, "there is no C++ compiler"
    command = [*shlex.split(compiler), *_FLAGS]
    if platform.machine() in ("x86_64", "AMD64"):
        command += _X86_FLAGS
    folder = Path(__file__).parent
    sources = [folder / name for name in _SOURCES]
    digest = hashlib.sha256(" ".join([*command, _machine()]).encode())
    for source in (*sources, *(folder / name for name in _HEADERS)):
        digest.update(source.read_bytes())
    try:
        library = cache_folder("native") / f"{digest.hexdigest()[:32]}.so"
        if not library.is_file():
            with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
                made = Path(scratch) / "kernels.so"
                done = subprocess.run(  # noqa: S603 (the user's own compiler on our own sources)
                    [*command, "-shared", "-fPIC", "-o", str(made), *map(str, sources)],
                    capture_output=True,
                    text=True,
                    timeout=300,
                    check=False,
                )
                if done.returncode:
                    return None, f"`{compiler}` failed: {done.stderr.strip().splitlines()[:1]}"
                made.replace(library)
        return Kernels(ctypes.CDLL(str(library))), ""
    except (OSError, subprocess.SubprocessError) as error:
        return None, str(error)


def _machine() -> str:
    """What decides which instructions the compiler may use: a cache can be shared by different machines."""
    return f"{platform.machine()} {platform.system()} {sorted(torch.cpu.get_capabilities().items())}"


def _as_c(argument: Tensor | int | float | None) -> object:
    match argument:
        case Tensor():
            assert argument.is_contiguous()
            return ctypes.c_void_p(argument.data_ptr())
        case None:
            return ctypes.c_void_p(None)
        case float():
            return ctypes.c_float(argument)
        case _:
            return ctypes.c_int64(argument)
