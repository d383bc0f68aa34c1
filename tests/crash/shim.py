"""The preloaded library of shim.cpp: builds it, sets its injection, and reads its record."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

SOURCE = Path(__file__).with_name("shim.cpp")
Act = Literal["nothing", "kill", "tear", "fail", "shorten", "fail for good", "corrupt"]
_ACTS: tuple[Act, ...] = ("nothing", "kill", "tear", "fail", "shorten", "fail for good", "corrupt")


@dataclass(frozen=True, slots=True)
class Injection:
    """A fault at call number `call` (from 1) of thread number `thread` (from 0)."""

    thread: int = 0
    call: int = 0
    act: Act = "nothing"
    error: int = 0  # errno of a failing call


@dataclass(frozen=True, slots=True)
class Call:
    """One call that changed files: `kind` is a letter of shim.cpp, `file` is the inode number.

    `path` and `target` (of a rename) are relative to the watched folder; "" is the folder itself.
    """

    kind: str
    thread: int
    number: int
    file: int
    offset: int  # of a write; the new size of a truncation
    path: str
    target: str
    data: bytes


def unavailable() -> str:
    """The reason why the shim is not available, or ""."""
    if sys.platform != "linux":
        return "the crash campaigns need Linux"
    return "" if _compiler() else "the crash campaigns need a C++ compiler"


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


@cache
def build(folder: Path) -> Path:
    """Compile the library into `folder`."""
    library = folder / "shim.so"
    compiler = _compiler()
    assert compiler
    options = ["-std=c++17", "-O1", "-Wall", "-Werror", "-shared", "-fPIC"]
    subprocess.run([*compiler.split(), *options, "-o", library, SOURCE, "-ldl"], check=True)
    return library


def watch(root: Path, log: Path | None, injection: Injection) -> None:
    """Start to watch calls below `root`. The process has the library preloaded, and `log` is outside `root`."""
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if log else -1
    library.crash_watch(
        os.fsencode(root.resolve()),
        descriptor,
        injection.thread,
        ctypes.c_long(injection.call),
        _ACTS.index(injection.act),
        injection.error,
    )


def read_log(log: Path, root: Path) -> Iterator[Call]:
    """The calls in the order of their effects."""
    content, position = log.read_bytes(), 0
    start = len(str(root.resolve()))

    def below(path: str) -> str:
        return path[start + 1 :] if path else ""

    while position < len(content):
        end = content.index(b"\n", position)
        kind, thread, number, file, offset, size, path, target = content[position:end].decode().split("\t")
        position = end + 1 + int(size)
        yield Call(
            kind=kind,
            thread=int(thread),
            number=int(number),
            file=int(file),
            offset=int(offset),
            path=below(path.removesuffix(" (deleted)")),
            target=below(target),
            data=content[end + 1 : position],
        )
