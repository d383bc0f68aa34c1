"""Rows from files of every kind, folders of files, and hub datasets, in chunks; each with the place it came from."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from lorafit.data.formats import FORMATS, Detected, Row, detect, parse
from lorafit.data.readers import SUFFIXES, Position, place_of, read_file, suffix_of
from lorafit.errors import DataError, Problem, Problems

CHUNK = 2048  # rows that are Python objects at a time: enough for all cores
# What `datasets` writes beside the data files of a saved dataset.
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_NUM_DETECT_ROWS = 100
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to read for `spec`; messages call it `name`. `revision` is the commit of a hub dataset, else ""."""

    spec: str
    name: str
    path: Path
    revision: str


@dataclass(frozen=True, slots=True)
class FileSummary:
    """What a file turned out to hold: its format, how that was found, and the number of its rows."""

    format: str
    reason: str
    num_rows: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows, and for each the line it starts in, 0 where its file has no lines."""

    rows: list[Row]
    lines: list[int]


def find_files(
    specs: Sequence[str],
    format: str = "auto",  # noqa: A002 (the name of the setting)
    revision: str | None = None,
    split: str = "train",
    offline: bool = False,
) -> tuple[list[SourceFile], list[Problem]]:
    """The files of all `specs`, and what is wrong with specs: each a file, a folder of files, or the id
    `owner/name` of a hub dataset.

    `revision`, `split` and `offline` are for hub datasets. Raises DataError when `format` is none.
    """
    if format not in ("auto", *FORMATS):
        hint = f"use auto or one of {', '.join(FORMATS)}"
        raise DataError(f"unknown data format {format!r}", place="data.format", hint=hint)
    files: list[SourceFile] = []
    problems: list[Problem] = []
    for spec in specs:
        try:
            files += _files(spec, revision, split, offline)
        except DataError as error:
            problems += error.problems
    return files, problems


class RowReader:
    """The rows of `files` in order, numbered through, in memory that does not grow with them.

    With the format `auto` every file's is detected by itself. `found` gets a summary of each file that was read
    to its end.
    """

    def __init__(self, files: Sequence[SourceFile], format: str = "auto") -> None:  # noqa: A002
        self.files, self._format = files, format
        self.found: list[FileSummary] = []
        self._position = Position()

    def chunks(self, size: int = CHUNK) -> Iterator[Chunk]:
        """The rows, at most `size` at a time; to be called once. Raises DataError at the end with all problems."""
        problems = Problems()
        for file in self.files:
            try:
                for chunk in self._chunks_of(file, size):
                    if not problems:
                        yield chunk
            except DataError as error:
                problems.add(error.problems, error.num_more)
        if problems:
            raise DataError.of(problems.kept, problems.num_more)

    def progress(self) -> tuple[int, int]:
        """(bytes read, bytes in all)."""
        sizes = [file.path.stat().st_size for file in self.files]
        done = len(self.found)
        reading = self._position.share() * sizes[done] if done < len(sizes) else 0
        return min(sum(sizes[:done]) + int(reading), sum(sizes)), sum(sizes)

    def _chunks_of(self, file: SourceFile, size: int) -> Iterator[Chunk]:
        """The chunks of one file; raises DataError, at the end where that is possible, with all its problems."""
        bad_lines, bad_rows = Problems(), Problems()
        raw = read_file(file.path, file.name, bad_lines, self._position)
        start = sum(summary.num_rows for summary in self.found)
        head = list(itertools.islice(raw, _NUM_DETECT_ROWS))
        if not head and not bad_lines:
            raise DataError("has no rows", place=file.name, hint="give a file with at least one row")
        detected = None if bad_lines else self._detect(file, [row for _, row in head])
        raw, number = itertools.chain(head, raw), 0
        while batch := list(itertools.islice(raw, size)):
            lines, rows = [line for line, _ in batch], [row for _, row in batch]
            if detected and not bad_lines:
                places = [place_of(file.name, number + 1 + i, line) for i, line in enumerate(lines)]
                try:
                    parsed = parse(rows, detected.format, places, start + number)
                    if not bad_rows:
                        yield Chunk(parsed, lines)
                except DataError as error:
                    bad_rows.add(error.problems)
            number += len(batch)
        if wrong := bad_lines or bad_rows:
            raise DataError.of(wrong.kept, wrong.num_more)
        assert detected is not None
        self.found.append(FileSummary(detected.format, detected.reason, number))

    def _detect(self, file: SourceFile, head: list[object]) -> Detected:
        if self._format != "auto":
            return Detected(self._format, "given")
        try:
            return detect(head)
        except DataError as error:
            problems = (Problem(problem.message, file.name, problem.hint) for problem in error.problems)
            raise DataError.of(problems) from error


def refuse(files: Sequence[SourceFile], format: str, problems: Sequence[Problem]) -> NoReturn:  # noqa: A002
    """Raises DataError with the problems of all `files`, if any, then `problems`."""
    try:
        for _ in RowReader(files, format).chunks():
            pass
    except DataError as error:
        raise DataError.of([*error.problems, *problems], error.num_more) from None
    raise DataError.of(problems)


def describe(files: Sequence[SourceFile], found: Sequence[FileSummary]) -> tuple[str, str]:
    """The format of all rows and how it was found, joined where files differ."""
    kinds = {(summary.format, summary.reason) for summary in found}
    reasons = dict.fromkeys(
        f"{file.name}: {summary.reason}" if len(kinds) > 1 else summary.reason
        for file, summary in zip(files, found, strict=True)
    )
    return "+".join(dict.fromkeys(summary.format for summary in found)), "; ".join(reasons)


def rows_at(files: Sequence[SourceFile], found: Sequence[FileSummary], numbers: Sequence[int]) -> list[Row]:
    """The rows with `numbers`, ascending, read from their files once more, as far as needed."""
    rows: list[Row] = []
    start = 0
    for file, summary in zip(files, found, strict=True):
        wanted = [number - start for number in numbers if start <= number < start + summary.num_rows]
        raw = enumerate(read_file(file.path, file.name, Problems()))
        for index in wanted:
            line, row = next(item for at, item in raw if at == index)
            place = place_of(file.name, index + 1, line)
            rows += parse([row], summary.format, [place], start + index)
        start += summary.num_rows
    return rows


def _files(spec: str, revision: str | None, split: str, offline: bool) -> list[SourceFile]:
    path = Path(spec).expanduser()
    if path.exists() or not _HUB_ID.fullmatch(spec) or suffix_of(path):
        return [SourceFile(spec, str(file), file, "") for file in data_files(path)]
    from lorafit.hub.client import dataset_files

    dataset = dataset_files(spec, revision=revision, split=split, offline=offline)
    return [SourceFile(spec, f"{spec}/{file.name}", file, dataset.revision) for file in dataset.paths]


def data_files(path: Path) -> list[Path]:
    """`path` itself if it is a data file, or the data files in the folder `path`, sorted by name."""
    if not path.exists():
        raise DataError("no such file or folder", place=str(path), hint=_nearest(path))
    known = f"data files end in {', '.join(SUFFIXES)}"
    if path.is_dir():
        files = sorted(
            file
            for file in path.iterdir()
            if suffix_of(file) and file.name not in _NOT_DATA and file.is_file()
        )
        if not files:
            raise DataError("the folder holds no data files", place=str(path), hint=known)
        return files
    if not suffix_of(path):
        raise DataError(f"unsupported kind of file {path.suffix!r}", place=str(path), hint=known)
    if not path.is_file():  # it would be read for ever
        raise DataError(
            "a pipe or a device is no data file", place=str(path), hint="write the rows to a file first"
        )
    return [path]


def _nearest(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist either"
    near = difflib.get_close_matches(path.name, [file.name for file in folder.iterdir()])
    if near:
        return f"did you mean {' or '.join(str(folder / name) for name in near)}?"
    return "check the path; a hub dataset is written owner/name"
