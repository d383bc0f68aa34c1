"""Rows from files of every kind, folders of files, and hub data sets, in chunks; each row with its place."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorafit.data.formats import FORMATS, Detected, Row, detect, parse
from lorafit.data.readers import Position, place_of, read_file
from lorafit.errors import DataError, Problem, Problems
from lorafit.hub.dataset_splits import FILE_KINDS, HUB_ID, METADATA, suffix_of

CHUNK = 2048  # rows that are Python objects at a time: enough for all cores
_NUM_DETECT_ROWS = 100


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of `spec`, an entry of `data.path`; messages call it `name`. `revision` is a hub data set's commit."""

    spec: str
    name: str
    path: Path
    revision: str


@dataclass(frozen=True, slots=True)
class FileSummary:
    """The format of a file, the reason for it, and the number of its rows."""

    format: str
    reason: str
    num_rows: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows, and the first line of each, 0 where its file has no lines."""

    rows: list[Row]
    lines: list[int]


def find_files(
    specs: Sequence[str],
    format: str = "auto",  # noqa: A002 (the name of the setting)
    revision: str | None = None,
    split: str = "train",
    offline: bool = False,
) -> list[SourceFile]:
    """The files of all `specs`: each a file, a folder of files, or the id `owner/name` of a hub data set.

    `revision`, `split` and `offline` are for hub data sets. Raises DataError when `format` is unknown, and when a
    spec has no files: then with the problems of the rows in the other files too.
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
    if not problems:
        return files
    try:
        for _ in RowReader(files, format).chunks():
            pass
    except DataError as error:
        raise DataError.of([*error.problems, *problems], error.num_more) from None
    raise DataError.of(problems)


class RowReader:
    """The rows of `files` in order, numbered from `start`, in memory that does not grow with them.

    With the format `auto` the format of each file is detected. `summaries` gets one of each file that was read to
    its end.
    """

    def __init__(
        self,
        files: Sequence[SourceFile],
        format: str = "auto",  # noqa: A002 (the name of the setting)
        start: int = 0,
    ) -> None:
        self.files, self._format, self._start = files, format, start
        self.summaries: list[FileSummary] = []
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

    def read(self, numbers: Collection[int]) -> list[Row]:
        """The rows with `numbers`, read as far as needed. Raises DataError for the first that does not exist."""
        rows: list[Row] = []
        last = self._start - 1
        for chunk in self.chunks():
            last = chunk.rows[-1].number
            rows += [row for row in chunk.rows if row.number in numbers]
            if len(rows) == len(numbers):
                return rows
        raise DataError(
            f"there is no row {sorted(numbers)[len(rows)] + 1:,}",
            place=", ".join(dict.fromkeys(file.spec for file in self.files)),
            hint=f"the last row is number {last + 1:,}",
        )

    def progress(self) -> tuple[int, int]:
        """(bytes read, bytes in all)."""
        sizes = [file.path.stat().st_size for file in self.files]
        done = len(self.summaries)
        reading = self._position.fraction() * sizes[done] if done < len(sizes) else 0
        return min(sum(sizes[:done]) + int(reading), sum(sizes)), sum(sizes)

    def _chunks_of(self, file: SourceFile, size: int) -> Iterator[Chunk]:
        """The chunks of one file; raises DataError, at the end where that is possible, with all its problems."""
        bad_lines, bad_rows = Problems(), Problems()
        raw = read_file(file.path, file.name, bad_lines, self._position)
        start = self._start + sum(summary.num_rows for summary in self.summaries)
        head = list(itertools.islice(raw, _NUM_DETECT_ROWS))
        if not head and not bad_lines:
            raise DataError("has no rows", place=file.name, hint="give a file with at least one row")
        detected = None if bad_lines else self._detect(file, [row.value for row in head])
        raw, num_rows = itertools.chain(head, raw), 0
        while batch := list(itertools.islice(raw, size)):
            if detected and not bad_lines:
                places = [place_of(file.name, row.number, row.line) for row in batch]
                try:
                    rows = parse([row.value for row in batch], detected.format, places, start + num_rows)
                    if not bad_rows:
                        yield Chunk(rows, [row.line for row in batch])
                except DataError as error:
                    bad_rows.add(error.problems)
            num_rows = batch[-1].number
        if wrong := bad_lines or bad_rows:
            raise DataError.of(wrong.kept, wrong.num_more)
        assert detected is not None
        self.summaries.append(FileSummary(detected.format, detected.reason, num_rows))

    def _detect(self, file: SourceFile, head: list[object]) -> Detected:
        if self._format != "auto":
            return Detected(self._format, "given")
        try:
            return detect(head)
        except DataError as error:
            problems = (Problem(problem.message, file.name, problem.hint) for problem in error.problems)
            raise DataError.of(problems) from error


def describe(files: Sequence[SourceFile], summaries: Sequence[FileSummary]) -> tuple[str, str]:
    """The format of all rows and the reason for it, joined where files differ."""
    kinds = {(summary.format, summary.reason) for summary in summaries}
    reasons = dict.fromkeys(
        f"{file.name}: {summary.reason}" if len(kinds) > 1 else summary.reason
        for file, summary in zip(files, summaries, strict=True)
    )
    return "+".join(dict.fromkeys(summary.format for summary in summaries)), "; ".join(reasons)


def _files(spec: str, revision: str | None, split: str, offline: bool) -> list[SourceFile]:
    path = Path(spec).expanduser()
    if path.exists() or not HUB_ID.fullmatch(spec) or suffix_of(path.name):
        return [SourceFile(spec, str(file), file, "") for file in data_files(path)]
    from lorafit.hub.client import dataset_files

    dataset = dataset_files(spec, revision=revision, split=split, offline=offline)
    return [SourceFile(spec, f"{spec}/{file.name}", file, dataset.revision) for file in dataset.paths]


def data_files(path: Path) -> list[Path]:
    """`path` itself if it is a data file, or the data files in the folder `path`, sorted by name."""
    if not path.exists():
        raise DataError("no such file or folder", place=str(path), hint=_nearest(path))
    known = f"data files end in {', '.join(FILE_KINDS)}"
    if path.is_dir():
        files = sorted(
            file
            for file in path.iterdir()
            if suffix_of(file.name) and file.name not in METADATA and file.is_file()
        )
        if not files:
            raise DataError("the folder holds no data files", place=str(path), hint=known)
        return files
    if not suffix_of(path.name):
        raise DataError(f"unsupported kind of file {path.suffix!r}", place=str(path), hint=known)
    if not path.is_file():  # reading it would never end
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
