"""The progress bar of work that takes longer than a moment."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressDisplay
from rich.progress import TimeRemainingColumn as EtaColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lorafit.observe.console import _clean, _console, _draws, _print_line
from lorafit.observe.events import (
    Progress,
)
from lorafit.observe.units import duration

QUIET_SECONDS = 0.5  # work that is done sooner than this shows no progress


@dataclass(frozen=True, slots=True)
class _BusyLine:
    """What is going on between two steps, and a bar."""

    event: Progress

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = f"{self.event.what} {self.event.done}/{self.event.total}  "
        line = Table.grid()
        width = max(options.max_width - len(text), 1)
        line.add_row(Text(text, style="bold"), ProgressBar(self.event.total, self.event.done, width))
        yield line


@contextmanager
def progress(
    title: str, *, quiet: bool = False, stream: TextIO | None = None
) -> Iterator[Callable[[int, int], None]]:
    """Show how far some work is while the block runs, which may call what it gets with (done, total).

    Nothing is shown for work done within half a second. After that a terminal shows a bar (a moving one until
    a total is known), anything else a line at the start and one at the end. Not while a `Terminal` is live,
    and never when `quiet`.
    """
    if quiet:
        yield lambda done, total: None
        return
    console = _console(stream or sys.stderr)
    title = _clean(title, console)
    bar = ProgressDisplay(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        EtaColumn(compact=True),
        console=console,
        transient=True,
        redirect_stdout=False,
    )
    task = bar.add_task(title, total=None)
    started = time.monotonic()
    is_shown, draws = threading.Event(), _draws(console)

    def show() -> None:
        is_shown.set()
        if draws:
            bar.start()
        else:
            _print_line(console, f"{title} ...")

    timer = threading.Timer(QUIET_SECONDS, show)
    timer.daemon = True
    timer.start()
    is_done = False
    try:
        yield lambda done, total: bar.update(task, completed=done, total=total)
        is_done = True
    finally:
        timer.cancel()
        timer.join()  # it may be drawing just now
        if is_shown.is_set():
            if draws:
                bar.stop()
            if is_done:  # else the error that follows says what happened
                _print_line(console, f"{title}: done in {duration(time.monotonic() - started)}")
