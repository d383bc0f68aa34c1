"""Reading files that somebody else may have written: plain files only, up to a limit, and JSON of any shape."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO

from lorafit.errors import DataError

MB = 1 << 20
MAX_LINE = 16 * MB  # characters of a line of standard input
_FLAGS = {
    "rb": os.O_RDONLY,
    "ab": os.O_WRONLY | os.O_APPEND | os.O_CREAT,
    "ab+": os.O_RDWR | os.O_APPEND | os.O_CREAT,
}
_NO_WAITING = getattr(os, "O_NONBLOCK", 0)  # opening a pipe waits for its other end without it


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes.

    Raises OSError, also for a pipe or a device, which might never end, and for a larger file.
    """
    with open(path, "rb", opener=_open_plain) as file:
        return file.read(_check_size(file, path, limit))


def read_lines(path: Path, limit: int, longest: int = MB) -> Iterator[bytes]:
    """The whole lines of a file of at most `limit` bytes, with their ends, one after the other.

    A line of more than `longest` bytes is skipped and comes as b"". A last line without an end is left out. Raises
    OSError as `read_bytes`.
    """
    with open(path, "rb", opener=_open_plain) as file:
        _check_size(file, path, limit)
        while line := file.readline(longest):
            if line.endswith(b"\n"):
                yield line
                continue
            while (rest := file.readline(longest)) and not rest.endswith(b"\n"):
                pass
            if rest:
                yield b""


def read_new(path: Path, start: int, most: int = 32 * MB) -> bytes:
    """The whole lines of a growing file from byte `start` on, of at most `most` bytes; b"" where there is none yet.

    A longer line comes in parts. Raises OSError as `read_bytes`.
    """
    with open(path, "rb", opener=_open_plain) as file:
        file.seek(start)
        block = file.read(most)
    end = block.rfind(b"\n") + 1
    return block[: end or (most if len(block) == most else 0)]


def num_whole(path: Path) -> int:
    """The number of bytes of a file up to the end of its last whole line. Raises OSError."""
    with open(path, "rb", opener=_open_plain) as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - MB)
            file.seek(start)
            if (found := file.read(end - start).rfind(b"\n")) >= 0:
                return start + found + 1
            end = start
    return 0


def read_text(path: Path, limit: int) -> str:
    """As `read_bytes`, as text. Raises ValueError where it is not UTF-8."""
    return read_bytes(path, limit).decode()


def read_json(path: Path, limit: int) -> Any:
    """The value in a JSON file. Raises OSError as `read_bytes`, and ValueError where it is not usable JSON."""
    return parse_json(read_bytes(path, limit))


def parse_json(content: str | bytes) -> Any:
    """The value in a JSON text. Raises ValueError, also for a value that is nested too deeply."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_stdin_lines(stream: TextIO) -> Iterator[str]:
    """The lines of standard input without their ends. Raises DataError for a line that is too long or not UTF-8."""
    try:
        for line in iter(lambda: stream.readline(MAX_LINE + 1), ""):
            if len(line) > MAX_LINE:
                raise DataError(f"a line has more than {MAX_LINE:,} characters", place="standard input")
            yield line.removesuffix("\n")
    except UnicodeDecodeError:
        raise DataError("it is not UTF-8 text", place="standard input", hint="write it as UTF-8") from None


def open_no_follow(path: Path, mode: Literal["rb", "ab", "ab+"]) -> BinaryIO:
    """A file of a run, opened without a buffer. Raises OSError where `path` is a link, a pipe or a device."""
    flags = _FLAGS[mode] | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    return os.fdopen(_open_plain(str(path), flags), mode, buffering=0)


def _check_size(file: BinaryIO, path: Path, limit: int) -> int:
    """The size of an open file. Raises OSError where it is above `limit`."""
    size = os.fstat(file.fileno()).st_size
    if size > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit // MB or 1} MB", str(path))
    return size


def _open_plain(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | _NO_WAITING, 0o644)  # never for others to write
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a plain file", path)
    return descriptor
