"""The raw rows of a data set in small Arrow files of the cache: any page and any search without reading all again.

A thread writes them while the first pages are looked at already. The layout of each file is found as training finds it.
Rows that were read to their end stay in the cache: the next studio reads none of them again. The data sets that were
looked at last stay, within MOST_BYTES.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorafit.data.columns import Layout, find_layout, mapped
from lorafit.data.formats import Row, parse
from lorafit.data.readers import place_of, read_file
from lorafit.data.sources import Sources
from lorafit.errors import DataError, LorafitError, Problem
from lorafit.storage.atomic import write_file
from lorafit.storage.cache_dir import cache_folder
from lorafit.storage.safe_read import parse_json, read_json

BLOCK = 2048  # rows per file
DETECT = 100  # first rows of a file that decide its layout
MOST_FOUND = 500  # rows of a search
MOST_BYTES = 10 * 10**9  # of all data sets in the cache
_WHOLE = "whole.json"  # written last: the number of rows and the layouts
_MAX_WHOLE = 2_000_000


@dataclass(frozen=True, slots=True)
class RawPageRow:
    """A row as its file holds it: its number over all files from 0, its place, its file, and its JSON or its fault."""

    number: int
    place: str
    file: int
    text: str
    fault: str = ""


class RowPages:
    """The rows of `sources`. `num_rows` grows until `is_complete`.

    `layouts` are by the number of the file; one without has its reason among `problems`, as has the end of the reading.
    """

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self.layouts: dict[int, Layout] = {}
        self.problems: list[Problem] = []
        self.num_rows, self.is_complete = 0, False
        self.path = cache_folder("studio-rows") / digest_of(sources)
        self.path.mkdir(mode=0o700, exist_ok=True)
        self._grown = threading.Condition()
        if self._is_known():
            os.utime(self.path)
        else:
            threading.Thread(target=self._fill, daemon=True).start()

    def wait(self, count: int, seconds: float) -> None:
        """Wait until `count` rows are known, all are, or `seconds` have passed."""
        with self._grown:
            self._grown.wait_for(lambda: self.is_complete or self.num_rows >= count, seconds)

    def page(self, first: int, count: int) -> list[RawPageRow]:
        """At most `count` rows from number `first` on, of those that are known."""
        numbers = range(max(0, first), min(max(0, first) + count, self.num_rows))
        blocks = dict.fromkeys(number // BLOCK for number in numbers)
        return [row for block in blocks for row in self._rows(block) if row.number in numbers]

    def rows(self, numbers: Sequence[int]) -> list[RawPageRow]:
        """The rows with these numbers, of those that are known."""
        wanted = {number for number in numbers if 0 <= number < self.num_rows}
        blocks = sorted({number // BLOCK for number in wanted})
        return [row for block in blocks for row in self._rows(block) if row.number in wanted]

    def search(self, text: str) -> list[int]:
        """The numbers of the first MOST_FOUND rows that hold `text`, whatever its case."""
        import pyarrow.compute as compute

        escaped = json.dumps(text, ensure_ascii=False)[1:-1]
        found: list[int] = []
        for block in range(-(-self.num_rows // BLOCK)):
            table = self._table(block)
            holds = compute.match_substring(table["text"], escaped, ignore_case=True)
            found += table["number"].filter(holds).to_pylist()
            if len(found) >= MOST_FOUND:
                break
        return found[:MOST_FOUND]

    def row(self, raw: RawPageRow) -> Row:
        """A row as training reads it. Raises DataError."""
        if raw.fault:
            raise DataError(raw.fault, place=raw.place)
        layout = self.layouts[raw.file]  # a file without one has its problem in `problems`
        (row,) = parse([mapped(parse_json(raw.text), layout.columns)], layout.format, [raw.place], raw.number)
        return row

    def _is_known(self) -> bool:
        """Whether the cache has all rows, as an earlier reading left them."""
        try:
            whole = read_json(self.path / _WHOLE, _MAX_WHOLE)
            count = int(whole["num_rows"])
            layouts = {int(index): Layout(**layout) for index, layout in whole["layouts"].items()}
            is_whole = all(self._file(block).is_file() for block in range(-(-count // BLOCK)))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return False
        if not is_whole or whole.get("block") != BLOCK:
            return False
        self.num_rows, self.layouts, self.is_complete = count, layouts, True
        return True

    def _fill(self) -> None:
        with self._noting():
            number = 0
            for index, file in enumerate(self.sources.files):
                reading = self.sources.reading
                raw = itertools.islice(
                    read_file(file.path, file.name, encoding=reading.encoding), file.first, file.stop
                )
                head = list(itertools.islice(raw, DETECT))
                good = [row.value for row in head if not isinstance(row.value, Problem)]
                with self._noting():
                    self.layouts[index] = find_layout(good, reading.format, reading.columns)
                rows: Iterator[RawPageRow] = (
                    _raw(number + offset, place_of(file.name, row.number, row.line), index, row.value)
                    for offset, row in enumerate(itertools.chain(head, raw))
                )
                for _ in self._written(rows, number):
                    pass
                number = self.num_rows
            if not self.problems:
                layouts = {index: asdict(layout) for index, layout in self.layouts.items()}
                whole = {"num_rows": number, "block": BLOCK, "layouts": layouts}
                write_file(self.path / _WHOLE, json.dumps(whole, ensure_ascii=False))
        with self._grown:
            self.is_complete = True
            self._grown.notify_all()
        with contextlib.suppress(OSError):
            make_room(self.path)

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        """Keep the problems that end the block."""
        try:
            yield
        except (LorafitError, OSError, ValueError) as error:
            listed = error.problems if isinstance(error, LorafitError) else [Problem(str(error))]
            self.problems += listed[:50]

    def _written(self, rows: Iterator[RawPageRow], start: int) -> Iterator[None]:
        """Write the rows in blocks; the last block of an earlier file is read and written again."""
        kept = self._rows(start // BLOCK) if start % BLOCK else []
        while True:
            batch = list(itertools.islice(rows, BLOCK - len(kept)))
            if not batch:
                return
            block = [*kept, *batch]
            kept = []
            self._write(block[0].number // BLOCK, block)
            with self._grown:
                self.num_rows = block[-1].number + 1
                self._grown.notify_all()
            yield

    def _write(self, block: int, rows: Sequence[RawPageRow]) -> None:
        import pyarrow as pa

        columns = {
            name: [getattr(row, name) for row in rows]
            for name in ("number", "place", "file", "text", "fault")
        }
        table = pa.table(columns)
        staged = self._file(block).with_suffix(f".{os.getpid()}")  # a second studio may read the same rows
        with pa.OSFile(str(staged), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        staged.replace(self._file(block))

    def _table(self, block: int) -> Any:
        import pyarrow as pa

        with pa.memory_map(str(self._file(block))) as file:
            return pa.ipc.open_file(file).read_all()

    def _rows(self, block: int) -> list[RawPageRow]:
        return [RawPageRow(**row) for row in self._table(block).to_pylist()]

    def _file(self, block: int) -> Path:
        return self.path / f"{block:06d}.arrow"


def _raw(number: int, place: str, file: int, value: object) -> RawPageRow:
    if isinstance(value, Problem):
        return RawPageRow(number, place, file, "", value.message)
    text = json.dumps(value, ensure_ascii=False, default=str).encode(errors="backslashreplace").decode()
    return RawPageRow(number, place, file, text)


def make_room(used: Path, most: int = MOST_BYTES) -> None:
    """Remove the data sets beside `used` that were looked at longest ago, beyond `most` bytes in all."""
    known = []
    for folder in used.parent.iterdir():
        with contextlib.suppress(OSError):
            size = sum(file.stat().st_size for file in folder.iterdir())
            known.append((folder == used, folder.stat().st_mtime, size, folder))
    left = most
    for is_used, _, size, folder in sorted(known, reverse=True):
        left -= size
        if left < 0 and not is_used:
            shutil.rmtree(folder, ignore_errors=True)


def digest_of(sources: Sources) -> str:
    """A digest of the files (place, size, time) and of how they are read."""
    facts: list[object] = [asdict(sources.reading)]
    for file in sources.files:
        status = file.path.stat()
        facts.append([str(file.path), status.st_size, status.st_mtime_ns, file.first, file.stop])
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:24]
