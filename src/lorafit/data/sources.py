"""Rows from files of every kind, folders of files, and hub datasets; each row with the place it came from."""

from __future__ import annotations

import csv
import difflib
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.data.formats import FORMATS, Detected, Row, detect, parse
from lorafit.errors import DataError, Problem

SUFFIXES = (
    ".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".ndjson.gz", ".csv", ".tsv",
    ".parquet", ".arrow", ".feather",
)  # fmt: skip
# What `datasets` writes beside the data files of a saved dataset.
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_NUM_DETECT_ROWS = 100
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

Placed = tuple[str, object]  # where a raw row is found, and the row


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """One file that was read for `spec`; `revision` is the commit of a hub dataset, "" for a local file."""

    spec: str
    name: str
    num_rows: int
    sha256: str
    revision: str


@dataclass(frozen=True, slots=True)
class Rows:
    """All rows of all sources in order; `format` and `reason` (how found) are joined where sources differ."""

    rows: list[Row]
    format: str
    reason: str
    sources: list[SourceInfo]


def load_rows(
    specs: Sequence[str],
    format: str = "auto",  # noqa: A002 (the name of the setting)
    revision: str | None = None,
    split: str = "train",
    offline: bool = False,
) -> Rows:
    """The rows of all `specs`: each a file, a folder of files, or the id `owner/name` of a hub dataset.

    With `auto` every file's format is detected by itself. `revision`, `split` and `offline` are for hub
    datasets. Raises DataError with the problems of all sources together.
    """
    if format not in ("auto", *FORMATS):
        hint = f"use auto or one of {', '.join(FORMATS)}"
        raise DataError(f"unknown data format {format!r}", place="data.format", hint=hint)
    rows: list[Row] = []
    found: list[Detected] = []
    sources: list[SourceInfo] = []
    problems: list[Problem] = []
    for spec in specs:
        try:
            files = _files(spec, revision, split, offline)
        except DataError as error:
            problems.extend(error.problems)
            continue
        for path, name, commit in files:
            try:
                detected, new = _load_file(path, name, format, len(rows))
            except DataError as error:
                problems.extend(error.problems)
                continue
            rows += new
            found.append(detected)
            sources.append(SourceInfo(spec, name, len(new), _sha256(path), commit))
    if problems:
        raise DataError.of(problems)
    formats = "+".join(dict.fromkeys(detected.format for detected in found))
    reasons = dict.fromkeys(
        f"{source.name}: {detected.reason}" if len(set(found)) > 1 else detected.reason
        for source, detected in zip(sources, found, strict=True)
    )
    return Rows(rows, formats, "; ".join(reasons), sources)


def _load_file(path: Path, name: str, wanted: str, start: int) -> tuple[Detected, list[Row]]:
    """The format and the rows of one file, numbered from `start`."""
    placed = list(read_source(path, name))
    if not placed:
        raise DataError("has no rows", place=name, hint="give a file with at least one row")
    places, raw_rows = zip(*placed, strict=True)
    if wanted != "auto":
        return Detected(wanted, "given"), parse(raw_rows, wanted, places, start)
    try:
        detected = detect(raw_rows[:_NUM_DETECT_ROWS])
    except DataError as error:
        raise DataError.of(
            Problem(problem.message, name, problem.hint) for problem in error.problems
        ) from error
    return detected, parse(raw_rows, detected.format, places, start)


def _files(spec: str, revision: str | None, split: str, offline: bool) -> list[tuple[Path, str, str]]:
    """The files of a spec as (path, name for the user, commit)."""
    path = Path(spec).expanduser()
    if path.exists() or not _HUB_ID.fullmatch(spec) or _suffix(path):
        return [(file, str(file), "") for file in data_files(path)]
    from lorafit.hub import dataset_files

    dataset = dataset_files(spec, revision=revision, split=split, offline=offline)
    return [(file, f"{spec}/{file.name}", dataset.revision) for file in dataset.paths]


def data_files(path: Path) -> list[Path]:
    """`path` itself if it is a data file, or the data files in the folder `path`, sorted by name."""
    if not path.exists():
        raise DataError("no such file or folder", place=str(path), hint=_nearest(path))
    known = f"data files end in {', '.join(SUFFIXES)}"
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if _suffix(file) and file.name not in _NOT_DATA)
        if not files:
            raise DataError("the folder holds no data files", place=str(path), hint=known)
        return files
    if not _suffix(path):
        raise DataError(f"unsupported kind of file {path.suffix!r}", place=str(path), hint=known)
    return [path]


def _nearest(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist either"
    near = difflib.get_close_matches(path.name, [file.name for file in folder.iterdir()])
    if near:
        return f"did you mean {' or '.join(str(folder / name) for name in near)}?"
    return "check the path; a hub dataset is written owner/name"


def read_source(path: Path, name: str | None = None) -> Iterator[Placed]:
    """The raw rows of a file, or of all data files in a folder, each with its place (`name` and row number).

    Raises DataError, for line-based files at the end with all bad lines.
    """
    for file in data_files(path):
        label = name or str(file)
        suffix = _suffix(file).removesuffix(".gz")
        if suffix == ".parquet":
            yield from _parquet(file, label)
        elif suffix in (".arrow", ".feather"):
            yield from _arrow(file, label)
        elif suffix in (".csv", ".tsv"):
            yield from _csv(_text(file, label), label, "\t" if suffix == ".tsv" else ",")
        elif suffix == ".json":
            yield from _json(_text(file, label), label)
        else:
            yield from _json_lines(_text(file, label), label)


def _suffix(path: Path) -> str:
    """The suffix of a data file, "" for any other."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix) and not name.startswith(".")), "")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text(path: Path, name: str) -> str:
    """The file as text: UTF-8, a byte order mark tolerated, unpacked if it is gzipped."""
    try:
        content = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            content = gzip.decompress(content)
        text = content.decode()
    except UnicodeDecodeError as error:
        bad = error.object[error.start]
        message = f"is not UTF-8: byte 0x{bad:02X} at offset {error.start}"
        raise DataError(message, place=name, hint="save the file as UTF-8") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"is not a whole gzip file: {error}", place=name, hint="pack the file again"
        ) from error
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", place=name) from error
    text = text.removeprefix("\ufeff")
    if not text.strip():
        raise DataError("the file is empty", place=name, hint="give a file with at least one row")
    return text


def _json(text: str, name: str) -> Iterator[Placed]:
    """A JSON array, or an object with one list among its values, or JSON lines under the wrong name."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.pos < len(text) and "\n" in text[: error.pos]:
            yield from _json_lines(text, name)
            return
        place = f"{name} line {error.lineno} column {error.colno}"
        raise DataError(
            f"is not JSON: {error.msg}", place=place, hint="mend the syntax at that place"
        ) from error
    except (RecursionError, ValueError) as error:
        raise DataError(
            f"is not usable JSON: {error}", place=name, hint="flatten or split the file"
        ) from error
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        value = lists[0] if len(lists) == 1 else value
    if not isinstance(value, list):
        hint = 'write [{...}, {...}], or an object with one list, such as {"data": [...]}'
        raise DataError("is not a list of rows", place=name, hint=hint)
    for number, row in enumerate(value, 1):
        yield f"{name} row {number}", row


def _json_lines(text: str, name: str) -> Iterator[Placed]:
    problems: list[Problem] = []
    number = 0
    for line_number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        number += 1
        place = f"{name} row {number}, line {line_number}"
        try:
            yield place, json.loads(line)
        except (ValueError, RecursionError) as error:
            fault = (
                f"{error.msg} (column {error.colno})"
                if isinstance(error, json.JSONDecodeError)
                else str(error)
            )
            problems.append(Problem(f"is not JSON: {fault}", place, "write one JSON object on each line"))
    if problems:
        raise DataError.of(problems)


def _csv(text: str, name: str, delimiter: str) -> Iterator[Placed]:
    limit = csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than a long answer
    try:
        yield from _csv_rows(
            csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), name
        )
    finally:
        csv.field_size_limit(limit)


def _csv_rows(reader: Any, name: str) -> Iterator[Placed]:
    """The rows of a csv.reader; the first is the header."""
    problems: list[Problem] = []
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
                    raise DataError(
                        "the header has empty or repeated names", place=f"{name} line 1", hint=hint
                    )
            elif fields:
                number += 1
                place = f"{name} row {number}, line {first_line}"
                if len(fields) == len(header):
                    yield place, dict(zip(header, fields, strict=True))
                else:
                    message = f"has {len(fields)} fields where the header has {len(header)}"
                    hint = 'put fields that hold a separator or a line break in "quotes"'
                    problems.append(Problem(message, place, hint))
    except csv.Error as error:
        problems.append(
            Problem(f"is not CSV: {error}", f"{name} line {line_number}", "mend the quotes there")
        )
    if problems:
        raise DataError.of(problems)


def _parquet(path: Path, name: str) -> Iterator[Placed]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _batches(file.iter_batches(), name)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"is not usable Parquet: {error}", place=name, hint="write the file again") from error


def _arrow(path: Path, name: str) -> Iterator[Placed]:
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
            yield from _batches(batches, name)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"is not usable Arrow: {error}", place=name, hint="write the file again") from error


def _batches(batches: Iterator[Any], name: str) -> Iterator[Placed]:
    """The rows of Arrow record batches; columns that are no text show up when the rows are parsed."""
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield f"{name} row {number}", row
