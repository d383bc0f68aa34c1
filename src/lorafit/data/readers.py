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
from typing import Any, BinaryIO, TextIO, cast

from lorafit.data.json_rows import SeveralValuesError, json_rows
from lorafit.errors import DataError, Problem, Problems

SUFFIXES = (
    ".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".ndjson.gz", ".csv", ".tsv",
    ".parquet", ".arrow", ".feather",
)  # fmt: skip
_BLOCK = 1 << 20
_BATCH = 2048  # rows of a Parquet or Arrow file that are Python objects at a time

RawRow = tuple[int, object]  # the line it starts in, 0 where the file has no lines, and the row


class Position:
    """How far a file is read, for showing."""

    def __init__(self) -> None:
        self.share: Callable[[], float] = lambda: 0.0


def suffix_of(path: Path) -> str:
    """The suffix of a data file, "" for any other."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix) and not name.startswith(".")), "")


def place_of(name: str, row: int, line: int) -> str:
    """Where a person finds row number `row` (from 1) of the file `name`; `line` 0 is not known."""
    return f"{name} row {row}, line {line}" if line else f"{name} row {row}"


def read_file(
    path: Path, name: str, problems: Problems, position: Position | None = None
) -> Iterator[RawRow]:
    """The raw rows of a data file, which messages call `name`.

    A line that is no row goes to `problems` and is counted as a row. Raises DataError where reading must end.
    """
    position = position or Position()
    kind = suffix_of(path).removesuffix(".gz")
    if kind == ".parquet":
        yield from ((0, row) for row in _parquet(path, name, position))
    elif kind in (".arrow", ".feather"):
        yield from ((0, row) for row in _arrow(path, name, position))
    elif kind in (".csv", ".tsv"):
        yield from _csv(path, name, "\t" if kind == ".tsv" else ",", problems, position)
    elif kind == ".json":
        try:
            with _text(path, name, None, position) as text:
                yield from ((0, row) for row in json_rows(text, name))
        except SeveralValuesError:
            yield from _json_lines(path, name, problems, position)
    else:
        yield from _json_lines(path, name, problems, position)


@contextlib.contextmanager
def _text(path: Path, name: str, newline: str | None, position: Position) -> Iterator[TextIO]:
    """The file as text: UTF-8, a byte order mark tolerated, unpacked if it is gzipped; refused if it is blank.

    `newline` is that of `open`, but None is like "\\n": nothing is translated.
    """
    try:
        with path.open("rb") as file, _unpacked(file, path) as raw:
            size = max(path.stat().st_size, 1)
            position.share = lambda: file.tell() / size
            text = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="\n" if newline is None else newline)
            while (block := text.read(1 << 16)) and block.isspace():
                pass
            if not block:
                hint = "give a file with at least one row"
                raise DataError("the file is empty", place=name, hint=hint)
            text.seek(0)
            yield text
    except UnicodeDecodeError as error:
        raise DataError(_bad_byte(path), place=name, hint="save the file as UTF-8") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        message = f"is not a whole gzip file: {error}"
        raise DataError(message, place=name, hint="pack the file again") from error
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", place=name) from error
    finally:
        position.share = lambda: 1.0


def _unpacked(file: BinaryIO, path: Path) -> BinaryIO:
    if not path.name.lower().endswith(".gz"):
        return file
    return cast(BinaryIO, gzip.GzipFile(fileobj=file))


def _bad_byte(path: Path) -> str:
    """What is wrong with the first byte of a file that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    with path.open("rb") as file, _unpacked(file, path) as raw:
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
        for line_number, line in enumerate(text, 1):
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
            yield line_number, row


def _csv(path: Path, name: str, delimiter: str, problems: Problems, position: Position) -> Iterator[RawRow]:
    limit = csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than a long answer
    try:
        with _text(path, name, "", position) as text:
            yield from _csv_rows(csv.reader(text, delimiter=delimiter, strict=True), name, problems)
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
                    yield first_line, dict(zip(header, fields, strict=True))
                else:
                    message = f"has {len(fields)} fields where the header has {len(header)}"
                    hint = 'put fields that hold a separator or a line break in "quotes"'
                    problems.add([Problem(message, place_of(name, number, first_line), hint)])
    except csv.Error as error:
        problems.add([Problem(f"is not CSV: {error}", f"{name} line {line_number}", "mend the quotes there")])


def _parquet(path: Path, name: str, position: Position) -> Iterator[object]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            yield from _rows_of(file.iter_batches(_BATCH), file.metadata.num_rows, position)
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
            yield from _rows_of(batches, 0, position)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"is not usable Arrow: {error}", place=name, hint="write the file again") from error


def _rows_of(batches: Iterator[Any], num_rows: int, position: Position) -> Iterator[object]:
    """The rows of Arrow record batches; columns that are no text show up when the rows are parsed."""
    done = 0
    position.share = lambda: done / num_rows if num_rows else 0.0
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH):
            rows = batch.slice(start, _BATCH).to_pylist()
            yield from rows
            done += len(rows)
