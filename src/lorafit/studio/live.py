"""A run that is read while it grows: of its metrics file only the new lines, however long it is."""

from __future__ import annotations

import threading
from collections import OrderedDict
from contextlib import suppress
from typing import TYPE_CHECKING

from lorafit.observe.metrics_file import number
from lorafit.observe.run_summary import Overview, Summary, summarize
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import identity
from lorafit.storage.safe_read import read_new

if TYPE_CHECKING:  # the report's modules load with the first page of a run
    from lorafit.report.run_data import Facts

MOST_LIVE = 16  # runs whose curves stay in memory


class LiveRun:
    """The metrics of a run, read on where they were read before. Safe between threads."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self._lock = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        from lorafit.report.run_data import Metrics

        self._file: tuple[int, int] | None = None
        self._read = 0
        self._metrics, self._overview = Metrics(), Overview()

    def facts(self) -> Facts:
        """The facts of the run now. Raises RunError."""
        from lorafit.report.run_data import read_facts

        with self._lock:
            self._refresh()
            return read_facts(self.run, self._metrics, summarize(self.run, self._overview))

    def _refresh(self) -> None:
        """Read the new lines. A file that was replaced (a run that resumes) or has shrunk is read again."""
        with suppress(FileNotFoundError, OSError):
            status = self.run.metrics_file.stat()
            if self._file not in (None, identity(status)) or status.st_size < self._read:
                self._begin()
            self._file = identity(status)
            while block := read_new(self.run.metrics_file, self._read):
                self._read += len(block)
                lines = block.splitlines(keepends=True)
                for line in lines:
                    self._metrics.add(line)
                self._overview.extend(lines)
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


class Summaries:
    """The summaries of runs, read again where their files or their state have changed."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[object, Summary]] = {}

    def of(self, run: RunDirectory, signs: object) -> Summary:
        """The summary of a run; `signs` differ where its files do."""
        known = self._known.get(str(run.path))
        if known is None or known[0] != signs:
            known = self._known[str(run.path)] = (signs, summarize(run))
        return known[1]


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
