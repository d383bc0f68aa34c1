"""From the number of a row over all files to its file, its place for messages, and its text."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from lorafit.data.formats import FORMATS, Row
from lorafit.data.readers import place_of
from lorafit.data.sources import FileSummary, RowReader, Sources
from lorafit.data.token_dataset import TokenDataset

Numbers = NDArray[np.int64]
_LISTED = 5  # rows that `places` names


class RowIndex:
    """The rows of `sources`, numbered from 0 in the order of the files; `encoded` has the lines of rows in files with
    lines.
    """

    def __init__(
        self, sources: Sources, summaries: Sequence[FileSummary], encoded: TokenDataset | None = None
    ) -> None:
        assert len(sources.files) == len(summaries)
        self.sources, self.files = sources, sources.files
        self.summaries, self._encoded = summaries, encoded
        self._ends = list(accumulate((summary.num_rows for summary in summaries), initial=0))

    @property
    def num_rows(self) -> int:
        """Rows of all files."""
        return self._ends[-1]

    @property
    def num_heldout(self) -> int:
        """Rows of the files that are only measured."""
        counts = zip(self.files, self.summaries, strict=True)
        return sum(summary.num_rows for file, summary in counts if file.heldout)

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
        """Indices into `numbers` of the rows that each entry of `data.path` gave, a folder's files together.

        `numbers` are of training rows.
        """
        specs = list(dict.fromkeys(file.spec for file in self.files if not file.heldout))
        num_groups = len(specs)
        specs += [file.spec for file in self.files if file.spec not in specs]
        group_of_file = np.array([specs.index(file.spec) for file in self.files])
        groups = group_of_file[self._file_of(numbers)]
        return [np.flatnonzero(groups == group) for group in range(num_groups)]

    def is_heldout(self, numbers: Numbers) -> NDArray[np.bool_]:
        """Whether the rows with `numbers` are of files that are only measured."""
        heldout = np.array([file.heldout for file in self.files], dtype=np.bool_)
        of_rows: NDArray[np.bool_] = heldout[self._file_of(numbers)]
        return of_rows

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
                reading = replace(self.sources.reading, format=summary.format, columns=summary.columns)
                rows += RowReader([file], reading, start).read(wanted)
        return rows

    def _file_of(self, numbers: Numbers) -> Numbers:
        """The index of the file of each row."""
        return np.searchsorted(self._ends[1:], numbers, side="right")

    def _in_file(self, number: int) -> tuple[str, int]:
        """(name of the file, number of the row in it, from 1)."""
        file = bisect_right(self._ends, number) - 1
        return self.files[file].name, number - self._ends[file] + self.files[file].first + 1
