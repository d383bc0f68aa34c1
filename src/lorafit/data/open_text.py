"""Opens a file as text: unpacked without growing past its limit, decoded, and with the place of a wrong byte."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from lorafit.errors import DataError
from lorafit.storage.safe_read import MB

LEAST_UNPACKED, MAX_RATIO = 16 * MB, 100
_BLOCK = 1 << 20
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Position:
    """The part of a file that was read, for progress."""

    def __init__(self) -> None:
        self.fraction: Callable[[], float] = lambda: 0.0


@contextlib.contextmanager
def open_text(
    path: Path, name: str, encoding: str, position: Position, newline: str | None = "\n"
) -> Iterator[TextIO]:
    """The file as text without a byte order mark, unpacked if it is packed. DataError if it is blank.

    `newline` is as for `open`.
    """
    codec = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
    try:
        size = max(path.stat().st_size, 1)
        with path.open("rb") as file, io.TextIOWrapper(_unpacked(file, path, size), codec) as text:
            _refuse_blank(text, name)
        with (
            path.open("rb") as file,
            io.TextIOWrapper(_unpacked(file, path, size), codec, newline=newline) as text,
        ):
            position.fraction = lambda: file.tell() / size
            yield text
    except _BombError as error:
        raise too_much(name) from error
    except UnicodeError as error:  # _bad_byte reads a packed file on and may find it broken
        with _packing_faults(path, name):
            raise _bad_byte(path, name, encoding, codec) from error
    except (gzip.BadGzipFile, EOFError, zlib.error, OSError) as error:
        with _packing_faults(path, name):
            raise error
    finally:
        position.fraction = lambda: 1.0


@contextlib.contextmanager
def _packing_faults(path: Path, name: str) -> Iterator[None]:
    """Replace the errors of unpacking and of the disk."""
    kind = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower(), "")
    try:
        yield
    except _BombError as error:
        raise too_much(name) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        message = f"is not a whole {kind} file: {error}"
        raise DataError(message, place=name, hint="pack the file again") from error
    except OSError as error:
        if kind == "zstd" and error.errno is None:
            message = "is not a whole zstd file"
            raise DataError(message, place=name, hint="pack the file again") from error
        raise DataError(f"cannot be read: {error.strerror or error}", place=name) from error


def most_unpacked(size: int) -> int:
    """The limit of bytes from a packed file of `size` bytes. Rows are text, which packs to a twentieth at best."""
    return LEAST_UNPACKED + MAX_RATIO * size


def too_much(name: str) -> DataError:
    """The error for a packed file beyond its limit."""
    hint = "if you trust its source, unpack it yourself and look at it"
    return DataError(f"unpacks to more than {MAX_RATIO} times its size", place=name, hint=hint)


class _BombError(Exception):
    """A packed file unpacks to more than its limit."""


class _Limited(io.RawIOBase):
    """The unpacked bytes of `source`, up to `most`."""

    def __init__(self, source: BinaryIO, most: int) -> None:
        super().__init__()
        self._source, self._left = source, most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        block = self._source.read(min(len(buffer), _BLOCK))
        self._left -= len(block)
        if self._left < 0:
            raise _BombError
        buffer[: len(block)] = block
        return len(block)


def _unpacked(file: BinaryIO, path: Path, size: int) -> BinaryIO:
    """The bytes of `file`, unpacked by the suffix of `path`."""
    source: BinaryIO
    match path.suffix.lower():
        case ".gz":
            source = cast(BinaryIO, gzip.GzipFile(fileobj=file))
        case ".zst":
            import pyarrow  # the standard library has zstd from Python 3.14 on

            source = cast(BinaryIO, pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd"))
        case _:
            return file
    return cast(BinaryIO, io.BufferedReader(_Limited(source, most_unpacked(size)), _BLOCK))


def _refuse_blank(text: TextIO, name: str) -> None:
    while (block := text.read(1 << 16)) and block.isspace():
        pass
    if not block:
        raise DataError("the file is empty", place=name, hint="give a file with at least one row")


def _bad_byte(path: Path, name: str, encoding: str, codec: str) -> DataError:
    """The error about the first byte of a file that is not text in its encoding."""
    decoder = codecs.getincrementaldecoder(codec)()
    line, start = 1, b""
    with path.open("rb") as file, _unpacked(file, path, path.stat().st_size) as raw:
        while True:
            block = raw.read(_BLOCK)
            start = start or block[:2]
            try:
                line += decoder.decode(block, final=not block).count("\n")
            except UnicodeError as error:
                what = "it begins without a byte order mark"
                if isinstance(error, UnicodeDecodeError):
                    line += error.object[: error.start].decode(codec, "replace").count("\n")
                    what = f"byte 0x{error.object[error.start]:02X}"
                break
            assert block
    if start in _UTF16:
        hint = "data.encoding=utf-16 reads it"
    else:
        hint = "name its encoding, such as data.encoding=cp949, cp1252 or utf-16, or save the file as UTF-8"
    called = "UTF-8" if encoding == "utf-8" else encoding
    return DataError(f"is not {called}: {what}", place=f"{name} line {line}", hint=hint)
