"""From the number of a row over all files to its file, its place for messages, and its text."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from lorafit.data.formats import FORMATS, Row
from lorafit.data.readers import place_of
from lorafit.data.sources import FileSummary, RowReader, SourceFile
from lorafit.data.token_dataset import TokenDataset

Numbers = NDArray[np.int64]
_LISTED = 5  # rows that `places` names


class RowIndex:
    """The rows of `files`, numbered from 0 in their order; `encoded` has the lines of rows in files with lines."""

    def __init__(
        self,
        files: Sequence[SourceFile],
        summaries: Sequence[FileSummary],
        encoded: TokenDataset | None = None,
    ) -> None:
        assert len(files) == len(summaries)
        self.files, self.summaries, self._encoded = files, summaries, encoded
        self._ends = list(accumulate((summary.num_rows for summary in summaries), initial=0))

    @property
    def num_rows(self) -> int:
        """Rows of all files."""
        return self._ends[-1]

    def place(self, number: int) -> str:
        """`rows.jsonl row 17, line 18`; without the line where it is not known."""
        name, row = self._in_file(number)
        return place_of(name, row, self._encoded.line_of(number) if self._encoded is not None else 0)

    def places(self, numbers: Sequence[int], count: int) -> str:
        """The first of `numbers`, file by file, and how many of the `count` rows are not named."""
        rows: dict[str, list[str]] = {}
        for name, row in map(self._in_file, numbers[:_LISTED]):
            rows.setdefault(name, []).append(f"{row:,}")
        parts = [
            f"{name} row{'s' if len(listed) > 1 or count > _LISTED else ''} {', '.join(listed)}"
            for name, listed in rows.items()
        ]
        return "; ".join(parts) + (f" and {count - _LISTED:,} more" if count > _LISTED else "")

    def groups(self, numbers: Numbers) -> list[Numbers]:
        """Indices into `numbers` of the rows that each entry of `data.path` gave, a folder's files together."""
        specs = list(dict.fromkeys(file.spec for file in self.files))
        group_of_file = np.array([specs.index(file.spec) for file in self.files])
        groups = group_of_file[self._file_of(numbers)]
        return [np.flatnonzero(groups == group) for group in range(len(specs))]

    def asking(self, numbers: Numbers) -> Numbers:
        """Those of `numbers` whose rows have a question."""
        asks = np.array([FORMATS[summary.format].content.asks for summary in self.summaries])
        asking: Numbers = numbers[asks[self._file_of(numbers)]]
        return asking

    def read(self, numbers: Sequence[int]) -> list[Row]:
        """The rows with `numbers`, ascending, read from their files once more, as far as needed."""
        rows: list[Row] = []
        bounds = pairwise(self._ends)
        for file, summary, (start, end) in zip(self.files, self.summaries, bounds, strict=True):
            if wanted := {number for number in numbers if start <= number < end}:
                rows += RowReader([file], summary.format, start).read(wanted)
        return rows

    def _file_of(self, numbers: Numbers) -> Numbers:
        """The index of the file of each row."""
        return np.searchsorted(self._ends[1:], numbers, side="right")

    def _in_file(self, number: int) -> tuple[str, int]:
        """(name of the file, number of the row in it, from 1)."""
        file = bisect_right(self._ends, number) - 1
        return self.files[file].name, number - self._ends[file] + 1
