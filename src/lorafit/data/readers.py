"""The raw rows of one file of any kind, one after the other, in memory that does not grow with the file."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from lorafit.data.json_rows import KEEP_ONE, MAX_ROW, has_row_lines, json_rows, line_value, too_long
from lorafit.data.open_text import Position, most_unpacked, open_text, too_much
from lorafit.data.strict_json import RepeatedKeyError
from lorafit.errors import DataError, Problem
from lorafit.hub.dataset_splits import FILE_KINDS, suffix_of
from lorafit.storage.safe_read import MB

_LEAST_ROW = 8  # bytes of a row of text
_BATCH = 64  # rows of a Parquet or Arrow file that are Python objects at a time
_THRIFT = 16 * MB  # bytes of a text, or items of a list, in the metadata of a Parquet file
_ONCE = "name every column, each name once"
_SEPARATORS = ",;\t|"  # of a CSV file; the first where two fit


class RawRow(NamedTuple):
    """A row as its file holds it: its number in the file (from 1), its first line (0 without lines), its value.

    The value is a Problem where the row cannot be read.
    """

    number: int
    line: int
    value: object


def place_of(name: str, row: int, line: int) -> str:
    """The place of row number `row` (from 1) of the file `name`; `line` is 0 where it is not known."""
    return f"{name} row {row}, line {line}" if line else f"{name} row {row}"


def read_file(
    path: Path, name: str, position: Position | None = None, encoding: str = "utf-8"
) -> Iterator[RawRow]:
    """The raw rows of a data file, which messages call `name`; `encoding` is that of text files.

    Raises DataError where reading must end.
    """
    position = position or Position()
    suffix = suffix_of(path.name)
    match FILE_KINDS.get(suffix):
        case "parquet":
            yield from _numbered(_parquet(path, name, position))
        case "arrow":
            yield from _numbered(_arrow(path, name, position))
        case "csv":
            with open_text(path, name, encoding, position, newline="") as text:
                yield from _csv(_lines(text, name), name, suffix.startswith(".tsv"))
        case "text":
            with open_text(path, name, encoding, position, newline=None) as text:
                document = text.read(MAX_ROW + 1)
                if len(document) > MAX_ROW:
                    raise DataError(
                        f"a text has more than {MAX_ROW:,} characters",
                        place=name,
                        hint="cut it into several files",
                    )
                yield RawRow(1, 0, {"text": document})
        case _:
            with open_text(path, name, encoding, position) as text:
                is_lines = has_row_lines(text)
            with open_text(path, name, encoding, position) as text:
                if is_lines:
                    yield from _json_lines(text, name)
                else:
                    for number, (line, value) in enumerate(json_rows(text, name), 1):
                        if isinstance(value, RepeatedKeyError):
                            value = Problem(str(value), place_of(name, number, line), KEEP_ONE)
                        yield RawRow(number, line, value)


def _numbered(rows: Iterator[object]) -> Iterator[RawRow]:
    """The rows of a file without lines."""
    return (RawRow(number, 0, row) for number, row in enumerate(rows, 1))


def _json_lines(text: TextIO, name: str) -> Iterator[RawRow]:
    number = 0
    for line_number, line in enumerate(_lines(text, name), 1):
        if line.isspace():
            continue
        number += 1
        value: object
        try:
            value = line_value(line)
        except RepeatedKeyError as error:
            value = Problem(str(error), place_of(name, number, line_number), KEEP_ONE)
        except (ValueError, RecursionError) as error:
            fault = str(error)
            if isinstance(error, json.JSONDecodeError):
                fault = f"{error.msg} (column {error.colno})"
            place = place_of(name, number, line_number)
            value = Problem(f"is not JSON: {fault}", place, "write one JSON object on each line")
        yield RawRow(number, line_number, value)


def _lines(text: TextIO, name: str) -> Iterator[str]:
    """The lines of a file. Raises DataError for one that is longer than any row."""
    for number, line in enumerate(iter(lambda: text.readline(MAX_ROW + 1), ""), 1):
        if len(line) > MAX_ROW:
            raise too_long(f"{name} line {number}")
        yield line


def _csv(lines: Iterator[str], name: str, has_tabs: bool) -> Iterator[RawRow]:
    """The rows of a table with a header. Columns without a name are called as pandas calls them."""
    csv.field_size_limit(min(MAX_ROW, sys.maxsize))  # the default of 128 KiB is less than a long answer
    first: list[str] = []  # up to the header
    while not first or first[-1].isspace():
        first.append(next(lines))
    separator = "\t" if has_tabs else _separator(first[-1])
    reader = csv.reader(itertools.chain(first, lines), delimiter=separator, strict=True)
    header: list[str] = []
    number = 0
    line_number = 1
    try:
        for fields in reader:
            first_line, line_number = line_number, reader.line_num + 1
            if not header:
                header = [field or f"Unnamed: {index}" for index, field in enumerate(fields)]
                if len(set(header)) < len(header):
                    raise DataError("the header has repeated names", place=f"{name} line 1", hint=_ONCE)
            elif fields:
                number += 1
                if len(fields) == len(header):
                    yield RawRow(number, first_line, dict(zip(header, fields, strict=True)))
                else:
                    message = f"has {len(fields)} fields where the header has {len(header)}"
                    hint = 'put fields that hold a separator or a line break in "quotes"'
                    place = place_of(name, number, first_line)
                    yield RawRow(number, first_line, Problem(message, place, hint))
    except csv.Error as error:
        place = f"{name} line {line_number}"
        raise DataError(f"is not CSV: {error}", place=place, hint="correct the quotes there") from error


def _separator(header: str) -> str:
    """The separator that gives a header the most columns."""

    def columns(separator: str) -> int:
        return len(next(csv.reader([header], delimiter=separator)))

    try:
        return max(_SEPARATORS, key=columns)
    except csv.Error:
        return ","


def _parquet(path: Path, name: str, position: Position) -> Iterator[object]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(
            path, pre_buffer=False, thrift_string_size_limit=_THRIFT, thrift_container_size_limit=_THRIFT
        ) as file:
            if file.metadata.num_rows * _LEAST_ROW > most_unpacked(path.stat().st_size):
                raise too_much(name)
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
        if len(set(batch.schema.names)) < batch.num_columns:
            raise DataError("columns have the same name", place=name, hint=_ONCE)
        for start in range(0, batch.num_rows, _BATCH):
            part = batch.slice(start, _BATCH)  # one batch of an Arrow file may be all of it
            left -= sum(_unpacked_bytes(column) for column in part.columns)
            if left < 0:
                raise too_much(name)
            try:
                rows = part.to_pylist()
            except ValueError as error:  # a field of an object is there twice
                raise DataError(f"cannot be read: {error}", place=name, hint="write the file again") from None
            yield from rows
            done += len(rows)
