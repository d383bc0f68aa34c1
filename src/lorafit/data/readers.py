"""The raw rows of one file of any kind, one after the other, in memory that does not grow with the file."""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO, cast

from lorafit.data.json_rows import MAX_ROW, SeveralValuesError, json_rows, too_long
from lorafit.errors import DataError, Problem, Problems
from lorafit.hub.dataset_splits import suffix_of
from lorafit.storage.safe_read import MB

LEAST_UNPACKED, MAX_RATIO = 16 * MB, 100
_LEAST_ROW = 8  # bytes of a row of text
_BLOCK = 1 << 20
_BATCH = 64  # rows of a Parquet or Arrow file that are Python objects at a time
_THRIFT = 16 * MB  # bytes of a text, or items of a list, in the metadata of a Parquet file


class RawRow(NamedTuple):
    """A row as its file holds it: its number in the file (from 1), its first line (0 without lines), its value."""

    number: int
    line: int
    value: object


class Position:
    """The part of a file that was read, for progress."""

    def __init__(self) -> None:
        self.fraction: Callable[[], float] = lambda: 0.0


def place_of(name: str, row: int, line: int) -> str:
    """The place of row number `row` (from 1) of the file `name`; `line` is 0 where it is not known."""
    return f"{name} row {row}, line {line}" if line else f"{name} row {row}"


def read_file(
    path: Path, name: str, problems: Problems, position: Position | None = None
) -> Iterator[RawRow]:
    """The raw rows of a data file, which messages call `name`.

    `problems` receives the lines that are not rows; they count as rows. Raises DataError where reading must end.
    """
    position = position or Position()
    kind = suffix_of(path.name).removesuffix(".gz")
    if kind == ".parquet":
        yield from _numbered(_parquet(path, name, position))
    elif kind in (".arrow", ".feather"):
        yield from _numbered(_arrow(path, name, position))
    elif kind in (".csv", ".tsv"):
        yield from _csv(path, name, "\t" if kind == ".tsv" else ",", problems, position)
    elif kind == ".json":
        try:
            with _text(path, name, None, position) as text:
                yield from _numbered(json_rows(text, name))
        except SeveralValuesError:
            yield from _json_lines(path, name, problems, position)
    else:
        yield from _json_lines(path, name, problems, position)


def _numbered(rows: Iterator[object]) -> Iterator[RawRow]:
    """The rows of a file without lines."""
    return (RawRow(number, 0, row) for number, row in enumerate(rows, 1))


@contextlib.contextmanager
def _text(path: Path, name: str, newline: str | None, position: Position) -> Iterator[TextIO]:
    """The file as UTF-8 text with or without a byte order mark, unpacked if it is gzipped. DataError if it is blank.

    `newline` is as for `open`, but None is like "\\n": nothing is translated.
    """
    try:
        size = max(path.stat().st_size, 1)
        with path.open("rb") as file, _unpacked(file, path, size) as raw:
            position.fraction = lambda: file.tell() / size
            text = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="\n" if newline is None else newline)
            try:
                while (block := text.read(1 << 16)) and block.isspace():
                    pass
                if not block:
                    hint = "give a file with at least one row"
                    raise DataError("the file is empty", place=name, hint=hint)
                text.seek(0)
                yield text
            except UnicodeDecodeError as error:  # _bad_byte reads a packed file on and may find it broken
                raise DataError(_bad_byte(path), place=name, hint="save the file as UTF-8") from error
    except _BombError as error:
        raise _too_much(name) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        message = f"is not a whole gzip file: {error}"
        raise DataError(message, place=name, hint="pack the file again") from error
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", place=name) from error
    finally:
        position.fraction = lambda: 1.0


class _BombError(Exception):
    """A packed file unpacks to more than its limit."""


class _Unpacked(gzip.GzipFile):
    """A gzip file that gives no more bytes than `most_unpacked` allows."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        super().__init__(fileobj=file)
        self._most = most_unpacked(size)

    def read(self, size: int | None = -1) -> bytes:
        return self._checked(super().read(size))

    def read1(self, size: int = -1) -> bytes:
        return self._checked(super().read1(size))

    def _checked(self, content: bytes) -> bytes:
        if self.tell() > self._most:
            raise _BombError
        return content


def most_unpacked(size: int) -> int:
    """The limit of bytes from a packed file of `size` bytes. Rows are text, which packs to a twentieth at best."""
    return LEAST_UNPACKED + MAX_RATIO * size


def _too_much(name: str) -> DataError:
    hint = "if you trust its source, unpack it yourself and look at it"
    return DataError(f"unpacks to more than {MAX_RATIO} times its size", place=name, hint=hint)


def _unpacked(file: BinaryIO, path: Path, size: int) -> BinaryIO:
    return cast(BinaryIO, _Unpacked(file, size)) if path.name.lower().endswith(".gz") else file


def _bad_byte(path: Path) -> str:
    """The message about the first byte of a file that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    with path.open("rb") as file, _unpacked(file, path, path.stat().st_size) as raw:
        while True:
            block = raw.read(_BLOCK)
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                offset = done + len(block) - len(error.object) + error.start
                return f"is not UTF-8: byte 0x{error.object[error.start]:02X} at offset {offset}"
            assert block
            done += len(block)


def _json_lines(path: Path, name: str, problems: Problems, position: Position) -> Iterator[RawRow]:
    number = 0
    with _text(path, name, "\n", position) as text:
        for line_number, line in enumerate(_lines(text, name), 1):
            if line.isspace():
                continue
            number += 1
            try:
                row = json.loads(line.removesuffix("\n"))
            except (ValueError, RecursionError) as error:
                fault = str(error)
                if isinstance(error, json.JSONDecodeError):
                    fault = f"{error.msg} (column {error.colno})"
                place = place_of(name, number, line_number)
                hint = "write one JSON object on each line"
                problems.add([Problem(f"is not JSON: {fault}", place, hint)])
                continue
            yield RawRow(number, line_number, row)


def _lines(text: TextIO, name: str) -> Iterator[str]:
    """The lines of a file. Raises DataError for one that is longer than any row."""
    for number, line in enumerate(iter(lambda: text.readline(MAX_ROW + 1), ""), 1):
        if len(line) > MAX_ROW:
            raise too_long(f"{name} line {number}")
        yield line


def _csv(path: Path, name: str, delimiter: str, problems: Problems, position: Position) -> Iterator[RawRow]:
    limit = csv.field_size_limit(MAX_ROW)  # the default of 128 KiB is less than a long answer
    try:
        with _text(path, name, "", position) as text:
            lines = _lines(text, name)
            yield from _csv_rows(csv.reader(lines, delimiter=delimiter, strict=True), name, problems)
    finally:
        csv.field_size_limit(limit)


def _csv_rows(reader: Any, name: str, problems: Problems) -> Iterator[RawRow]:
    """The rows of a csv.reader; the first is the header."""
    header: list[str] = []
    number = 0
    line_number = 1
    try:
        for fields in reader:
            first_line, line_number = line_number, reader.line_num + 1
            if not header:
                header = fields
                if len(set(header)) < len(header) or not all(header):
                    hint = "name every column, each name once"
                    message = "the header has empty or repeated names"
                    raise DataError(message, place=f"{name} line 1", hint=hint)
            elif fields:
                number += 1
                if len(fields) == len(header):
                    yield RawRow(number, first_line, dict(zip(header, fields, strict=True)))
                else:
                    message = f"has {len(fields)} fields where the header has {len(header)}"
                    hint = 'put fields that hold a separator or a line break in "quotes"'
                    problems.add([Problem(message, place_of(name, number, first_line), hint)])
    except csv.Error as error:
        problems.add(
            [Problem(f"is not CSV: {error}", f"{name} line {line_number}", "correct the quotes there")]
        )


def _parquet(path: Path, name: str, position: Position) -> Iterator[object]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(
            path, pre_buffer=False, thrift_string_size_limit=_THRIFT, thrift_container_size_limit=_THRIFT
        ) as file:
            if file.metadata.num_rows * _LEAST_ROW > most_unpacked(path.stat().st_size):
                raise _too_much(name)
            batches = file.iter_batches(_BATCH)
            yield from _rows_of(batches, file.metadata.num_rows, position, path, name)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"is not usable Parquet: {error}", place=name, hint="write the file again") from error


def _arrow(path: Path, name: str, position: Position) -> Iterator[object]:
    """Arrow's file format (also Feather) or its stream format, which `datasets` writes."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as source:
            try:
                file = pyarrow.ipc.open_file(source)
                batches: Iterator[Any] = (file.get_batch(index) for index in range(file.num_record_batches))
            except pyarrow.ArrowInvalid:
                source.seek(0)
                batches = iter(pyarrow.ipc.open_stream(source))
            yield from _rows_of(batches, 0, position, path, name)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"is not usable Arrow: {error}", place=name, hint="write the file again") from error


def _unpacked_bytes(column: Any) -> int:
    """Bytes of an Arrow column with every reference to a dictionary resolved."""
    import pyarrow

    return int((column.dictionary_decode() if pyarrow.types.is_dictionary(column.type) else column).nbytes)


def _rows_of(
    batches: Iterator[Any], num_rows: int, position: Position, path: Path, name: str
) -> Iterator[object]:
    """The rows of Arrow record batches. `parse` reports columns that are not text."""
    done = 0
    left = most_unpacked(path.stat().st_size)
    position.fraction = lambda: done / num_rows if num_rows else 0.0
    for batch in batches:
        batch.validate(full=True)  # a wrong offset would read other memory
        for start in range(0, batch.num_rows, _BATCH):
            part = batch.slice(start, _BATCH)  # one batch of an Arrow file may be all of it
            left -= sum(_unpacked_bytes(column) for column in part.columns)
            if left < 0:
                raise _too_much(name)
            rows = part.to_pylist()
            yield from rows
            done += len(rows)
