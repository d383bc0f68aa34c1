"""A run that is read while it grows: of its metrics file only the new lines, however long it is.

A page of a run with a million steps is there after FIRST_SECONDS, and its curves grow until all steps are read.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.observe.metrics_file import number
from lorafit.observe.run_summary import Overview, Summary, summarize
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import identity
from lorafit.storage.safe_read import MB, read_new
from lorafit.studio.folder import signs

if TYPE_CHECKING:  # the report's modules load with the first page of a run
    from lorafit.report.run_data import Facts

MOST_LIVE = 16  # runs whose curves stay in memory
FIRST_SECONDS = 1.0
_BLOCK = 8 * MB


class Growing:
    """A file that grows, read on where it was read before."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: tuple[int, int] | None = None
        self._read = 0

    def blocks(self) -> Iterator[tuple[bool, bytes]]:
        """The new lines in blocks, each with whether it begins the file: at first, and where another one replaced it
        (a run that resumes) or it has shrunk. Nothing without a file. Raises OSError.
        """
        with suppress(FileNotFoundError):
            status = self._path.stat()
            begins = self._file != identity(status) or status.st_size < self._read
            self._file, self._read = identity(status), 0 if begins else self._read
            while block := read_new(self._path, self._read, _BLOCK):
                self._read += len(block)
                yield begins, block
                begins = False


class LiveRun:
    """The metrics of a run, read on where they were read before. Safe between threads.

    `is_read` is whether the facts that were asked for last have all steps.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.is_read = False
        self._lock = threading.Lock()
        self._growing = Growing(run.metrics_file)
        self._begin()

    def _begin(self) -> None:
        from lorafit.report.run_data import Metrics

        self._metrics, self._overview = Metrics(), Overview()
        self._first: Summary | None = None

    def facts(
        self, most_seconds: float = math.inf, summary: Callable[[RunDirectory], Summary] = summarize
    ) -> Facts:
        """The facts of the run now. Raises RunError.

        The curves end where `most_seconds` of reading have passed; `summary` gives that of the whole run then.
        """
        from lorafit.report.run_data import read_facts

        with self._lock:
            self._refresh(time.monotonic() + most_seconds)
            if self.is_read:
                known = summarize(self.run, self._overview)
            else:
                known = self._first = self._first or summary(self.run)
            return read_facts(self.run, self._metrics, known)

    def _refresh(self, deadline: float) -> None:
        self.is_read = True
        with suppress(OSError):
            for begins, block in self._growing.blocks():
                if begins:
                    self._begin()
                lines = block.splitlines(keepends=True)
                for line in lines:
                    self._metrics.add(line)
                self._overview.extend(lines)
                if time.monotonic() > deadline:
                    self.is_read = False
                    break
        self._metrics.steps.flush()


class LiveRuns:
    """The runs that pages look at; those of the last MOST_LIVE stay in memory."""

    def __init__(self) -> None:
        self._runs: OrderedDict[str, LiveRun] = OrderedDict()

    def of(self, run: RunDirectory) -> LiveRun:
        """The live run of a run directory."""
        live = self._runs.setdefault(str(run.path), LiveRun(run))
        self._runs.move_to_end(str(run.path))
        while len(self._runs) > MOST_LIVE:
            self._runs.popitem(last=False)
        return live


@dataclass(slots=True)
class _Listed:
    """What is known of a run in the list."""

    growing: Growing
    overview: Overview = field(default_factory=Overview)
    signs: object = None
    summary: Summary | None = None


class Summaries:
    """The summaries of runs, read on where their files or their state have changed. Safe between threads."""

    def __init__(self) -> None:
        self._known: dict[str, _Listed] = {}
        self._lock = threading.Lock()

    def of(self, run: RunDirectory) -> Summary:
        """The summary of a run now."""
        with self._lock:
            known = self._known.setdefault(str(run.path), _Listed(Growing(run.metrics_file)))
            now = signs(run)
            if known.summary is None or known.signs != now:
                known.signs, known.summary = now, self._summary(run, known)
            return known.summary

    def _summary(self, run: RunDirectory, known: _Listed) -> Summary:
        try:
            for begins, block in known.growing.blocks():
                known.overview = Overview() if begins else known.overview
                if not known.overview.extend(block.splitlines(keepends=True)):
                    return summarize(run)  # a damaged line: all are parsed
        except OSError:
            return summarize(run)
        return summarize(run, known.overview)


def seconds_left(facts: Facts) -> float | None:
    """The time of the steps that are left, at the mean time of a step so far; None while nothing is known."""
    summary, seconds = facts.summary, facts.steps.sums["seconds"]
    if not summary.num_steps or not summary.step or not seconds:
        return None
    return max(0.0, seconds / summary.step * (summary.num_steps - summary.step))


def ranks(facts: Facts) -> dict[str, float]:
    """What the newest step says of several ranks: their number and imbalance; nothing for one rank."""
    newest = facts.newest_step
    count = number(newest.get("ranks")) or 1
    return {"ranks": count, "imbalance": number(newest.get("imbalance")) or 0.0} if count > 1 else {}
