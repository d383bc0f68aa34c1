"""The CPU kernels: compiled once on this machine with its own C++ compiler, cached, and called through ctypes.

They are only faster: model/ops.py has the same operations in torch, which run if there is no compiler. Results do not
depend on the number of threads.
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
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from lorafit.model.native.recording import Recording, active, recording
from lorafit.redact import logger_of, one_line
from lorafit.storage.atomic import sha256_file
from lorafit.storage.cache_dir import cache_folder, cache_home
from lorafit.storage.locks import exclusive_lock
from lorafit.storage.ownership import not_own
from lorafit.storage.safe_read import read_text

logger = logger_of(__name__)

_SOURCES = (
    "rows.cpp",
    "attention.cpp",
    "convolution.cpp",
    "delta_rule.cpp",
    "decode_linear.cpp",
    "decode.cpp",
    "products.cpp",
)
_HEADERS = ("team.h", "common.h", "vectors.h", "dots.h", "documents.h", "attention_dots.h")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
_X86_FLAGS = ("-mprefer-vector-width=512",)  # if the processor has them; the default is 256
_DIGEST = ".sha256"  # the suffix of the file with the digest of a library
COMPILE_SECONDS = 600
_SUFFIX = {torch.float32: "_f32", torch.bfloat16: "_bf16"}


class Kernels:
    """The compiled functions. A tensor is passed by its memory: contiguous, on the CPU, float32 or bfloat16."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.has_tiles = self._flag("has_tiles")
        """Whether the processor multiplies matrix tiles and the system lets this process use them."""
        self.has_products = self._flag("has_products")
        """Whether the kernels `product` and `int8_product` exist: on tiles, or in vectors of dot products."""

    def call(self, name: str, dtype: torch.dtype, *arguments: Tensor | int | float | None) -> None:
        """Run the kernel `name` of `dtype` on all of torch's threads. Scalars are int64 or float32."""
        kernel = name + _SUFFIX[dtype]
        getattr(self._library, kernel)(*map(_as_c, arguments), ctypes.c_int(torch.get_num_threads()))
        if (record := active()) is not None:
            record.add(kernel, arguments)

    def recording(self) -> AbstractContextManager[Recording]:
        """Record the kernel calls of a block, to run them again in one call."""
        return recording(self._library)

    def _flag(self, name: str) -> bool:
        answer = ctypes.c_int64(0)
        getattr(self._library, name)(ctypes.byref(answer), ctypes.c_int(1))
        return bool(answer.value)


def fits(*tensors: Tensor) -> bool:
    """Whether the kernels can work on these tensors."""
    return all(t.device.type == "cpu" and t.dtype in _SUFFIX for t in tensors) and kernels() is not None


def kernels() -> Kernels | None:
    """The kernels of this machine, compiled at the first call; None if they are not available."""
    return _build()[0]


def missing() -> str:
    """Why the kernels are not available; "" if they are."""
    return _build()[1]


@functools.cache
def blocks() -> ctypes.CDLL | None:
    """`keep_blocks` and `release_blocks` of model/native/blocks.cpp; None if they are not available."""
    if sys.platform != "linux":
        return None
    torch_folder = Path(torch.__file__).parent
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    flags = ("-std=c++20", "-O2", abi, f"-I{torch_folder / 'include'}")
    links = (f"-L{torch_folder / 'lib'}", "-lc10")
    return _compiled(("blocks.cpp",), flags, links)[0]


@functools.cache
def _build() -> tuple[Kernels | None, str]:
    library, why = _compiled((*_SOURCES, *_HEADERS), _flags())
    return (None if library is None else Kernels(library)), why


def is_cached() -> bool:
    """Whether the kernels are compiled. Nothing is compiled or created."""
    command = _command(_flags())
    return bool(command) and _is_ours(cache_home() / "native" / _name(command, (*_SOURCES, *_HEADERS)))


def trial() -> str:
    """Why kernels cannot be compiled here; "" if a small program can, with the flags of the kernels."""
    command = _command(_flags())
    if not command:
        return _no_compiler()
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "trial.cpp"
        source.write_text(
            "#include <omp.h>\nint main() { return omp_get_max_threads() < 0; }\n", encoding="ascii"
        )
        try:
            _compile(command, [source], (), Path(scratch) / "trial.so")
        except (OSError, subprocess.SubprocessError) as error:
            return _reason(command, error)
    return ""


def _flags() -> tuple[str, ...]:
    return _FLAGS + (_X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else ())


def _command(flags: Sequence[str]) -> list[str]:
    """The compiler with `flags`, empty if there is none."""
    if os.environ.get("LORAFIT_NATIVE") == "0":
        return []
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    return [*shlex.split(compiler), *flags] if compiler else []


def _no_compiler() -> str:
    return "LORAFIT_NATIVE=0" if os.environ.get("LORAFIT_NATIVE") == "0" else "there is no C++ compiler"


def _name(command: Sequence[str], files: Sequence[str], links: Sequence[str] = ()) -> str:
    """The file name of a library in the cache."""
    digest = hashlib.sha256(" ".join([*command, *links, _machine()]).encode())
    for name in files:
        digest.update((Path(__file__).parent / name).read_bytes())
    return f"{digest.hexdigest()[:32]}.so"


def _compiled(
    files: Sequence[str], flags: Sequence[str], links: Sequence[str] = ()
) -> tuple[ctypes.CDLL | None, str]:
    """The library of these sources and headers, from the cache or the compiler, or why there is none."""
    command = _command(flags)
    if not command:
        return None, _no_compiler()
    sources = [Path(__file__).parent / name for name in files if name.endswith(".cpp")]
    try:
        library = cache_folder("native") / _name(command, files, links)
        if not _is_ours(library):
            # one of the ranks of a host compiles
            with exclusive_lock(library.with_suffix(".turn"), _report_holder, COMPILE_SECONDS):
                if not _is_ours(library):
                    _compile(command, sources, links, library)
        return ctypes.CDLL(str(library)), ""
    except (OSError, subprocess.SubprocessError) as error:
        return None, _reason(command, error)


def _reason(command: Sequence[str], error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = error.stderr.strip().splitlines() or [f"exit code {error.returncode}"]
        return f"`{command[0]}` failed: {lines[0]}"
    return str(error)


def _is_ours(library: Path) -> bool:
    """Whether the library is there, the user's own, and as it was compiled."""
    try:
        known = read_text(library.with_suffix(_DIGEST), 100)
        return not not_own(library) and sha256_file(library) == known
    except (OSError, ValueError):
        return False


def _report_holder(holder: str) -> None:
    logger.warning("the kernels are being compiled, and this process waits for it: %s", one_line(holder))


def _compile(command: Sequence[str], sources: Sequence[Path], links: Sequence[str], library: Path) -> None:
    """Compile all sources in parallel and link the library. Raises CalledProcessError."""

    def run(*words: object) -> None:
        subprocess.run(  # noqa: S603 (the user's own compiler on our own sources)
            [*command, *map(str, words)],
            capture_output=True,
            text=True,
            timeout=COMPILE_SECONDS / 2,
            check=True,
        )

    with (
        tempfile.TemporaryDirectory(dir=library.parent) as scratch,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        list(pool.map(lambda pair: run("-fPIC", "-c", "-o", *pair), zip(objects, sources, strict=True)))
        linked = Path(scratch) / "kernels.so"
        run("-shared", "-o", linked, *objects, *links)
        linked.chmod(0o600)
        digest = Path(scratch) / "digest"
        digest.write_text(sha256_file(linked), encoding="utf-8")
        linked.replace(library)
        digest.replace(library.with_suffix(_DIGEST))


def _machine() -> str:
    """What a library depends on: torch, and the processor's instructions. Machines can share a cache."""
    instructions = sorted(torch.cpu.get_capabilities().items())
    return f"{torch.__version__} {platform.machine()} {platform.system()} {instructions}"


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
