"""Small files that somebody else may have written: plain files only, read whole up to a limit, JSON of any shape."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO, cast

from lorafit.errors import DataError

MB = 1 << 20
MAX_LINE = 16 * MB  # characters of a line of standard input


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes.

    Raises OSError, also for a pipe or a device, which might never end, and for a longer file.
    """
    with open(path, "rb", opener=_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a plain file", str(path))
        if status.st_size > limit:
            raise OSError(errno.EFBIG, f"it is larger than {limit // MB or 1} MB", str(path))
        return file.read(status.st_size)


def read_text(path: Path, limit: int) -> str:
    """As `read_bytes`, as text. Raises ValueError where it is not UTF-8."""
    return read_bytes(path, limit).decode()


def read_json(path: Path, limit: int) -> Any:
    """The value in a JSON file. Raises OSError as `read_bytes`, and ValueError where it is not usable JSON."""
    return parse_json(read_bytes(path, limit))


def read_stdin_lines(stream: TextIO) -> Iterator[str]:
    """The lines of standard input without their ends. Raises DataError where it is no text or a line never ends."""
    try:
        for line in iter(lambda: stream.readline(MAX_LINE + 1), ""):
            if len(line) > MAX_LINE:
                raise DataError(f"a line has more than {MAX_LINE:,} characters", place="standard input")
            yield line.removesuffix("\n")
    except UnicodeDecodeError:
        raise DataError("it is not UTF-8 text", place="standard input", hint="write it as UTF-8") from None


def parse_json(content: str | bytes) -> Any:
    """The value that `content` spells out. Raises ValueError, also for a value that is nested too deeply."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _without_waiting(path: str, flags: int) -> int:
    """Opening a pipe waits for its other end, unless asked not to."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


_FLAGS = {
    "rb": os.O_RDONLY,
    "ab": os.O_WRONLY | os.O_APPEND | os.O_CREAT,
    "ab+": os.O_RDWR | os.O_APPEND | os.O_CREAT,
}


def open_no_follow(path: Path, mode: Literal["rb", "ab", "ab+"]) -> BinaryIO:
    """A file of ours, opened without a buffer and without waiting. Raises OSError where somebody put a link, a pipe or
    a device in its place.
    """

    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, _FLAGS[mode] | flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a plain file", str(path))
    return cast(BinaryIO, os.fdopen(descriptor, mode, buffering=0))
