"""The progress bar of slow work."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.progress import (
    BarColumn,
    Progress,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from lorafit.observe.console import LiveLine, can_redraw, clean_line, console_of, print_line
from lorafit.observe.units import duration

QUIET_SECONDS = 0.5  # faster work shows no progress


class _Eta(TimeRemainingColumn):
    """The time that remains, and nothing while it is unknown."""

    def render(self, task: Task) -> Text:
        return Text("eta ").append(super().render(task)) if task.total else Text()


@contextmanager
def progress(
    title: str, *, quiet: bool = False, stream: TextIO | None = None
) -> Iterator[Callable[[int, int], None]]:
    """Show the progress of a block, which may call the function that it gets with (done, total).

    Work of less than half a second shows nothing. After that, a terminal shows a bar, and a pipe gets one line at the
    start and one at the end. Not to be used while a `Terminal` is live. `quiet` shows nothing.
    """
    if quiet:
        yield lambda done, total: None
        return
    console = console_of(stream or sys.stderr)
    title = clean_line(title, console)
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        _Eta(compact=True),
        console=console,
        expand=True,
    )
    bar.live = LiveLine(console, bar.get_renderable)
    task = bar.add_task(title, total=None)
    started = time.monotonic()
    is_shown, has_bar = threading.Event(), can_redraw(console)

    def show() -> None:
        is_shown.set()
        if has_bar:
            bar.start()
        else:
            print_line(console, f"{title} ...")

    timer = threading.Timer(QUIET_SECONDS, show)
    timer.daemon = True
    timer.start()
    is_done = False
    try:
        yield lambda done, total: bar.update(task, completed=done, total=total)
        is_done = True
    finally:
        timer.cancel()
        timer.join()  # `show` may be running
        if is_shown.is_set():
            if has_bar:
                bar.stop()
            if is_done:  # else an error follows
                print_line(console, f"{title}: done in {duration(time.monotonic() - started)}")
