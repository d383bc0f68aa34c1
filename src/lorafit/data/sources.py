"""Rows from files of every kind, folders of files, and hub data sets, in chunks; each row with its place."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lorafit.data.columns import Layout, find_layout, mapped
from lorafit.data.folders import Found, SourceFile, Wanted, files_of, not_read
from lorafit.data.formats import FORMATS, Row, parse
from lorafit.data.open_text import Position
from lorafit.data.readers import RawRow, place_of, read_file
from lorafit.data.row_faults import RowFaults, kind_of
from lorafit.data.split_parts import cut, split_and_part, without
from lorafit.errors import DataError, Problem, Problems
from lorafit.redact import one_line

CHUNK = 2048  # rows that are Python objects at a time: enough for all cores
_NUM_DETECT_ROWS = 100
_MAX_REASONS = 50  # of rows that are left out; further ones have one in common
_OTHER = "other faults"


@dataclass(frozen=True, slots=True)
class Reading:
    """How files become rows: format, column of each field (`data.columns`), encoding of text files, and whether rows
    that cannot be used are left out (`data.bad_rows`).
    """

    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    encoding: str = "utf-8"
    drops: bool = False


@dataclass(frozen=True, slots=True)
class Sources:
    """The files of a data set, how they are read, and which data files are not (`not read: ...`, or "")."""

    files: Sequence[SourceFile]
    reading: Reading = Reading()
    left_out: str = ""

    def reader(self) -> RowReader:
        """A reader of all rows."""
        return RowReader(self.files, self.reading)


@dataclass(frozen=True, slots=True)
class FileSummary:
    """The format of a file, the reason for it, the number of its rows, and the columns of the format's fields."""

    format: str
    reason: str
    num_rows: int
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows of one file, and the first line of each, 0 where its file has no lines.

    `dropped` are the numbers and reasons of rows that are left out. `start` is the number that the file's first row
    has, or would have.
    """

    rows: list[Row]
    lines: list[int]
    dropped: list[tuple[int, str]] = field(default_factory=list)
    name: str = ""
    start: int = 0


def find_sources(
    specs: Sequence[str],
    reading: Reading = Reading(),
    wanted: Wanted = Wanted(),  # noqa: B008
    heldout: Sequence[str] = (),
    heldout_wanted: Wanted = Wanted(None),  # noqa: B008
) -> Sources:
    """The files of all `specs`: each a file, a folder, a pattern, or the id `owner/name` of a hub data set.

    The files of `heldout` come last; they are not among the others. Raises DataError when the format is unknown, and
    when a spec has no files: then with the problems of the rows in the other files too.
    """
    if reading.format not in ("auto", *FORMATS):
        hint = f"use auto or one of {', '.join(FORMATS)}"
        raise DataError(f"unknown data format {reading.format!r}", place="data.format", hint=hint)
    problems: list[Problem] = []
    training, measured = Found(), Found()
    for found, listed, chosen in (training, specs, wanted), (measured, heldout, heldout_wanted):
        try:
            split, part = split_and_part(chosen.split, chosen.key)
        except DataError as error:
            problems += error.problems
            continue
        for spec in listed:
            try:
                of_spec = files_of(spec, replace(chosen, split=split))
                found.left_out += of_spec.left_out
                files = of_spec.files
                if part is not None:
                    files = cut(files, part, chosen.key, reading.encoding, exact=found is measured)
                found.files += files
            except DataError as error:
                problems += error.problems
    kept = [
        rest
        for file in training.files
        for rest in without(file, [m for m in measured.files if m.path.resolve() == file.path.resolve()])
    ]
    for spec in sorted({file.spec for file in training.files} - {file.spec for file in kept}):
        hint = "give other rows in data.path"
        problems.append(Problem("all its rows are held out: none is left to train on", spec, hint))
    rest = [replace(file, heldout=True) for file in measured.files]
    read = {file.name.removeprefix(f"{file.spec}/") for file in rest}
    left_out = [(name, why) for name, why in training.left_out + measured.left_out if name not in read]
    left_out += [
        (file.name, _outside(file)) for file in (*kept, *rest) if file.first or file.stop is not None
    ]
    sources = Sources([*kept, *rest], reading, not_read(dict.fromkeys(left_out)))
    if not problems:
        return sources
    try:
        for _ in sources.reader().chunks():
            pass
    except DataError as error:
        raise DataError.of([*error.problems, *problems], error.num_more) from None
    raise DataError.of(problems)


def _outside(file: SourceFile) -> str:
    """What of a file is not read."""
    to = f" to {file.stop:,}" if file.stop is not None else " on"
    return f"all but rows from {file.first + 1:,}{to}"


class RowReader:
    """The rows of `files` in order, numbered from `start`, in memory that does not grow with them.

    With the format `auto` the format of each file is detected. `summaries` gets one of each file that was read to
    its end, `dropped` the numbers of the rows that were left out by their reason.
    """

    def __init__(
        self,
        files: Sequence[SourceFile],
        reading: Reading = Reading(),
        start: int = 0,
    ) -> None:
        self.files, self.reading, self._start = files, reading, start
        self.summaries: list[FileSummary] = []
        self.dropped: dict[str, array[int]] = {}
        self._reasons: dict[str, str] = {}
        self._position = Position()

    def chunks(self, size: int = CHUNK) -> Iterator[Chunk]:
        """The rows, at most `size` at a time; to be called once. Raises DataError at the end with all problems."""
        problems = Problems()
        has_rows = False
        for file in self.files:
            try:
                for chunk in self._chunks_of(file, size):
                    has_rows = has_rows or bool(chunk.rows)
                    if not problems:
                        yield chunk
            except DataError as error:
                problems.add(error.problems, error.num_more)
        if problems:
            raise DataError.of(problems.kept, problems.num_more)
        if self.dropped and not has_rows:
            counts = [
                (f"{len(rows):,} row{'s' if len(rows) > 1 else ''}", why)
                for why, rows in self.dropped.items()
            ]
            reasons = "; ".join(f"{count}: {why}" for count, why in counts)
            raise DataError(f"no row can be used: {reasons}", hint="correct the rows, or see data.columns")

    def read(self, numbers: Collection[int]) -> list[Row]:
        """The rows with `numbers`, read as far as needed. Raises DataError for the first that does not exist."""
        rows: list[Row] = []
        last = self._start - 1
        for chunk in self.chunks():
            last = max(
                [last, *(row.number for row in chunk.rows[-1:]), *(number for number, _ in chunk.dropped)]
            )
            rows += [row for row in chunk.rows if row.number in numbers]
            if len(rows) == len(numbers):
                return rows
        missing = sorted(set(numbers) - {row.number for row in rows})[0]
        reason = next((reason for reason, dropped in self.dropped.items() if missing in dropped), "")
        raise DataError(
            f"row {missing + 1:,} is left out: {reason}" if reason else f"there is no row {missing + 1:,}",
            place=", ".join(dict.fromkeys(file.spec for file in self.files)),
            hint="" if reason else f"the last row is number {last + 1:,}",
        )

    def heldout(self) -> list[int]:
        """The numbers of the rows in files that are only measured, of those that were read to their end."""
        ends = itertools.accumulate((summary.num_rows for summary in self.summaries), initial=self._start)
        bounds = zip(self.files, itertools.pairwise(ends), strict=False)
        return [number for file, (start, end) in bounds if file.heldout for number in range(start, end)]

    def progress(self) -> tuple[int, int]:
        """(bytes read, bytes in all)."""
        sizes = [file.path.stat().st_size for file in self.files]
        done = len(self.summaries)
        reading = self._position.fraction() * sizes[done] if done < len(sizes) else 0
        return min(sum(sizes[:done]) + int(reading), sum(sizes)), sum(sizes)

    def _chunks_of(self, file: SourceFile, size: int) -> Iterator[Chunk]:
        """The chunks of one file; raises DataError, at the end where that is possible, with all its problems."""
        faults, start = RowFaults(), self._start + sum(summary.num_rows for summary in self.summaries)
        raw = read_file(file.path, file.name, self._position, self.reading.encoding)
        raw = itertools.islice(raw, file.first, file.stop)
        num_rows = 0
        try:
            head = list(itertools.islice(raw, _NUM_DETECT_ROWS))
            if not head:
                beyond = f" from row {file.first + 1:,} on" if file.first else ""
                raise DataError(
                    f"has no rows{beyond}", place=file.name, hint="give a file with at least one row"
                )
            layout = self._layout(file, [row.value for row in head if not isinstance(row.value, Problem)])
            raw = itertools.chain(head, raw)
            while batch := list(itertools.islice(raw, size)):
                chunk = self._parse(file.name, batch, layout, start - file.first, faults)
                num_rows = batch[-1].number - file.first
                if not faults:
                    yield chunk
        except DataError as error:
            if faults:
                raise DataError.of([*faults.problems(0), *error.problems]) from error
            raise
        if faults:
            raise DataError.of(faults.problems(num_rows), faults.num_more)
        self.summaries.append(FileSummary(layout.format, layout.reason, num_rows, dict(layout.columns)))

    def _layout(self, file: SourceFile, head: list[object]) -> Layout:
        if not head:  # all lines are faults
            return Layout("text", "")
        try:
            return find_layout(head, self.reading.format, self.reading.columns)
        except DataError as error:
            problems = (Problem(p.message, p.place or file.name, p.hint) for p in error.problems)
            raise DataError.of(problems) from error

    def _parse(
        self, name: str, batch: Sequence[RawRow], layout: Layout, start: int, faults: RowFaults
    ) -> Chunk:
        """The rows of `batch`; those with a fault are dropped, or their faults go to `faults`."""
        chunk = Chunk([], [], [], name, start)
        good = [row for row in batch if not isinstance(row.value, Problem)]
        places = [place_of(name, row.number, row.line) for row in batch]
        values = [mapped(row.value, layout.columns) for row in good]
        if len(good) == len(batch):
            numbers = batch[0].number - 1 + start
            try:
                rows = parse(values, layout.format, places, numbers)
                return Chunk(rows, [row.line for row in batch], [], name, start)
            except DataError:
                pass  # one by one
        following = iter(values)
        for raw, place in zip(batch, places, strict=True):
            number = start + raw.number - 1
            if isinstance(raw.value, Problem):
                problems: Sequence[Problem] = [raw.value]
            else:
                try:
                    chunk.rows.extend(parse([next(following)], layout.format, [place], number))
                    chunk.lines.append(raw.line)
                    continue
                except DataError as error:
                    problems = error.problems
            if self.reading.drops:
                chunk.dropped.append((number, self._reason(problems[0].message)))
                self.dropped.setdefault(chunk.dropped[-1][1], array("q")).append(number)
            else:
                for problem in problems:
                    faults.add(name, raw.number, place, problem)
        return chunk

    def _reason(self, message: str) -> str:
        """The reason for rows that are left out: the first message about their fault."""
        message, fault = one_line(message), kind_of(message)
        if fault not in self._reasons and len(self._reasons) >= _MAX_REASONS:
            return _OTHER
        return self._reasons.setdefault(fault, message)


def describe(sources: Sources, summaries: Sequence[FileSummary]) -> tuple[str, str]:
    """The format of all rows and the reason for it, joined where files differ, and which files are not read."""
    kinds = {(summary.format, summary.reason) for summary in summaries}
    reasons = dict.fromkeys(
        f"{file.name}: {summary.reason}" if len(kinds) > 1 else summary.reason
        for file, summary in zip(sources.files, summaries, strict=True)
    )
    formats = "+".join(dict.fromkeys(summary.format for summary in summaries))
    return formats, "; ".join(filter(None, [*reasons, sources.left_out]))
