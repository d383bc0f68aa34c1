"""Everything the program draws: the run's live line, other progress, tables and answers side by side.

What is shown may come from anywhere (model answers, file names), so it is never read as markup, and control
characters are taken out.
"""

from __future__ import annotations

import contextlib
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TextIO

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as EtaColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .events import (
    Answers,
    Busy,
    Diagnosis,
    Event,
    Heldout,
    Note,
    Proved,
    RunEnded,
    RunStarted,
    Sample,
    Saved,
    Step,
)
from .meters import Meter

QUIET_SECONDS = 0.5  # work that is done sooner than this shows no progress
MIN_BAR_WIDTH = 8
LEAST_IMPORTANT_FIRST = (
    "elapsed",
    "memory",
    "learning_rate",
    "speed",
    "eta",
    "loss",
)  # on a narrow live line
SIDE_BY_SIDE_WIDTH = 80
SAMPLE_CHARACTERS = 240


class Terminal:
    """An observer that shows a run: a live line on a terminal, plain lines every `log_every` steps elsewhere.

    The loss shown is the mean of the last `log_every` steps. A context manager: leaving it puts the terminal
    back in order, however the run ended.
    """

    def __init__(self, stream: TextIO | None = None, *, log_every: int = 10) -> None:
        self._stream = stream or sys.stderr
        self._console = _console(self._stream)
        self._live: Live | None = None
        self._is_gone = False
        self._log_every = log_every
        self._losses: deque[float] = deque(maxlen=log_every)
        self._meter = Meter()
        self._started = time.monotonic()
        self._answer: str | None = None  # the last one that was shown

    def __call__(self, event: Event) -> None:
        if self._is_gone:
            return
        try:
            self._show(event)
        except (OSError, ValueError):  # the terminal was closed or the pipe's reader left: the run goes on
            self._is_gone = True

    def _show(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._say(_started(event))
                self._started = time.monotonic()
            case Step():
                self._step(event)
            case Heldout():
                self._say(_heldout(event))
            case Saved():
                self._say(f"step {event.step}  saved {event.path} ({event.reason})")
            case Busy():
                self._busy(event)
            case Sample():
                self._sample(event)
            case Answers():
                self._answers(event)
            case Proved():
                self._proved(event)
            case Note(level="warning"):
                self._say(f"warning: {event.text}", style="yellow")
            case Note():
                self._say(event.text)
            case Diagnosis():
                self._say(f"step {event.step}  {event.text}: {event.hint}", style="yellow")
            case RunEnded():
                self.close()
                self._say(_ended(event))

    def close(self) -> None:
        """Take the live line away; what was printed stays."""
        if self._live is not None:
            live, self._live = self._live, None
            with contextlib.suppress(OSError, ValueError):  # the terminal was closed
                live.stop()

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _step(self, event: Step) -> None:
        self._losses.append(event.loss)
        self._meter.update(event.tokens, event.seconds)
        loss = sum(self._losses) / len(self._losses)
        eta = self._meter.eta(event.num_steps - event.step) or 0.0
        if _draws(self._console):
            line = _LiveLine(event, loss, eta, self._started)
            if self._live is None:
                # stdout stays what it is: it may be a pipe, and it carries data
                self._live = Live(line, console=self._console, transient=True, redirect_stdout=False)
                self._live.start()
            else:
                self._live.update(line)
        elif event.step % self._log_every == 0 or event.step == event.num_steps:
            self._say("  ".join(_parts(event, loss, eta).values()))

    def _busy(self, event: Busy) -> None:
        """On a terminal a bar in place of the live line; elsewhere nothing, what comes of it is a line itself."""
        if not _draws(self._console):
            return
        line = _BusyLine(event)
        if self._live is None:
            self._live = Live(line, console=self._console, transient=True, redirect_stdout=False)
            self._live.start()
        else:
            self._live.update(line)

    def _sample(self, event: Sample) -> None:
        self.close()
        side_by_side(event.prompt, _beginning(event.base), _beginning(event.tuned), stream=self._stream)

    def _answers(self, event: Answers) -> None:
        """The first prompt and its answer in a line, unless it is the same as before; the report has all of them."""
        if event.prompts and event.tuned[0] != self._answer:
            self._answer = event.tuned[0]
            prompt, answer = (" ".join(text.split()) for text in (event.prompts[0], self._answer))
            self._say(f"step {event.step}  {_short(prompt)} -> {_short(answer)}")

    def _proved(self, event: Proved) -> None:
        self.close()
        for number, line in enumerate(event.lines, 1):
            took = f"  ({duration(event.seconds)})" if number == len(event.lines) else ""
            self._say(f"proof  {line}{took}")
        failed = event.verdict == "fail"
        for fault in event.faults:
            self._say(f"{'error' if failed else 'warning'}: {fault}", style="red" if failed else "yellow")
        if failed:
            self._say(" hint: the adapter is kept, but is not what was trained; proof.json has the numbers")

    def _say(self, line: str, style: str = "") -> None:
        _print_line(self._console, line, style)


def _parts(event: Step, loss: float, eta: float, elapsed: float | None = None) -> dict[str, str]:
    """The pieces of a progress line by name, in their order on the line."""
    parts = {
        "step": f"step {event.step}/{event.num_steps}",
        "loss": f"loss {loss:.3f}",
        "learning_rate": f"lr {event.learning_rate:.1e}",
        "speed": f"{event.tokens_per_second:,.0f} tokens/s",
    }
    if elapsed is not None:
        parts["elapsed"] = duration(elapsed)
    return {**parts, "eta": f"eta {duration(eta)}", "memory": memory_size(event.memory_bytes)}


@dataclass(frozen=True, slots=True)
class _LiveLine:
    """The live line: the parts that fit the terminal's present width, and a bar in what is left."""

    event: Step
    loss: float
    eta: float
    started: float

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        parts = _parts(self.event, self.loss, self.eta, time.monotonic() - self.started)
        for name in LEAST_IMPORTANT_FIRST:
            if MIN_BAR_WIDTH + sum(len(part) + 2 for part in parts.values()) <= options.max_width:
                break
            del parts[name]
        step, others = parts.pop("step") + "  ", "".join("  " + part for part in parts.values())
        width = max(options.max_width - len(step) - len(others), 1)
        line = Table.grid()
        line.add_row(
            Text(step, style="bold"), ProgressBar(self.event.num_steps, self.event.step, width), Text(others)
        )
        yield line


@dataclass(frozen=True, slots=True)
class _BusyLine:
    """What is going on between two steps, and a bar."""

    event: Busy

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = f"{self.event.what} {self.event.done}/{self.event.total}  "
        line = Table.grid()
        width = max(options.max_width - len(text), 1)
        line.add_row(Text(text, style="bold"), ProgressBar(self.event.total, self.event.done, width))
        yield line


@contextmanager
def progress(title: str, *, stream: TextIO | None = None) -> Iterator[Callable[[int, int], None]]:
    """Show how far some work is while the block runs, which may call what it gets with (done, total).

    Nothing is shown for work done within half a second. After that a terminal shows a bar (a moving one until
    a total is known), anything else a line at the start and one at the end. Not while a `Terminal` is live.
    """
    console = _console(stream or sys.stderr)
    title = _clean(title, console)
    bar = Progress(
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


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, stream: TextIO | None = None) -> None:
    """Print rows of text in columns. A terminal folds long cells into its width; a pipe gets whole rows."""
    console = _console(stream or sys.stdout)
    if not console.is_terminal:
        console.width = 10_000
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for header in headers:
        grid.add_column(Text(header), overflow="fold")
    for row in rows:
        grid.add_row(*(Text(_clean(cell, console)) for cell in row))
    console.print(grid)


STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red"}


def print_verdicts(lines: Sequence[tuple[str, str, str]], *, stream: TextIO | None = None) -> None:
    """Print (pass, warn or fail; what was looked at; what was found), one a line and unbroken."""
    width = max((len(name) for _, name, _ in lines), default=0)
    for outcome, name, text in lines:
        print_styled([(outcome, STYLES[outcome]), (f"  {name:<{width}}  {text}", "")], stream=stream)


def has_colours(stream: TextIO | None = None) -> bool:
    """Whether `stream` is a terminal that shows colours, and the user wants them."""
    console = _console(stream or sys.stdout)
    return console.color_system is not None and not console.no_color


def print_styled(parts: Sequence[tuple[str, str]], *, stream: TextIO | None = None) -> None:
    """Print (text, style) one after the other, unbroken; the text alone where there are no colours."""
    console = _console(stream or sys.stdout)
    console.print(Text.assemble(*((_clean(text, console), style) for text, style in parts)), soft_wrap=True)


def side_by_side(question: str, base_answer: str, tuned_answer: str, *, stream: TextIO | None = None) -> None:
    """Print what the base model and the tuned model answer to `question`, next to each other.

    Below 80 columns the answers stand under each other.
    """
    console = _console(stream or sys.stdout)
    console.print(Text(_clean(question.strip(), console), style="bold"))
    console.print(_two_answers(console, base_answer, tuned_answer))
    console.print()


def _two_answers(console: Console, base_answer: str, tuned_answer: str) -> RenderableType:
    base, tuned = (Text(_clean(answer.strip(), console)) for answer in (base_answer, tuned_answer))
    if console.width < SIDE_BY_SIDE_WIDTH:
        titles = (Text(title, style="cyan") for title in ("base", "tuned"))
        answers_below = (Padding(answer, (0, 0, 0, 2)) for answer in (base, tuned))
        return Group(*(part for pair in zip(titles, answers_below, strict=True) for part in pair))
    answers = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, expand=True)
    answers.add_column(Text("base", style="cyan"), ratio=1, overflow="fold")
    answers.add_column(Text("tuned", style="cyan"), ratio=1, overflow="fold")
    answers.add_row(base, tuned)
    return answers


def _console(stream: TextIO) -> Console:
    return Console(file=stream, highlight=False, markup=False, emoji=False)


def _draws(console: Console) -> bool:
    """Whether the console can move its cursor, so that something may be drawn over."""
    return console.is_terminal and not console.is_dumb_terminal


def _print_line(console: Console, line: str, style: str = "") -> None:
    """Print `line` unbroken, whatever the width, so that paths in it can be copied."""
    console.print(Text(_clean(line, console), style=style), soft_wrap=True)


ESCAPE_SEQUENCES = re.compile(r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b\].*?(?:\x07|\x1b\\)|\x1b.", re.DOTALL)
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """`text` without what steers a terminal: escape sequences, control characters, changes of direction.

    Line ends and tabs stay.
    """
    return CONTROL_CHARACTERS.sub("", ESCAPE_SEQUENCES.sub("", text.replace("\r\n", "\n")))


def _clean(text: str, console: Console) -> str:
    """Printable `text` in which a question mark stands for what the console's encoding lacks."""
    return printable(text).encode(console.encoding, "replace").decode(console.encoding)


def _beginning(answer: str) -> str:
    """As much of an answer as a glance needs; samples.json has all of it."""
    return answer if len(answer) <= SAMPLE_CHARACTERS else answer[:SAMPLE_CHARACTERS].rstrip() + " [...]"


def _started(event: RunStarted) -> str:
    share = 100 * event.num_trainable / max(event.num_parameters, 1)
    return (
        f"{event.model}  {short_count(event.num_parameters)} parameters, {short_count(event.num_trainable)} trained"
        f" ({share:.2g} %)  {event.device} {event.dtype}\n"
        f"{event.num_rows:,} rows  {event.num_steps:,} steps  output {event.output}"
    )


def _heldout(event: Heldout) -> str:
    base = "" if event.base_loss is None else f" (base {event.base_loss:.3f})"
    return f"step {event.step}  held-out loss {event.loss:.3f}{base}{'  best so far' if event.best else ''}"


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _ended(event: RunEnded) -> str:
    return f"{event.reason} after {event.step:,} steps in {duration(event.seconds)}\nadapter {event.adapter}"


def duration(seconds: float) -> str:
    """`42s`, `1m 12s`, `3h 05m` or `2d 04h`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}h"
    if hours:
        return f"{hours}h {minute:02d}m"
    return f"{minutes}m {second:02d}s" if minutes else f"{second}s"


def short_count(number: float) -> str:
    """`950`, `4.5K`, `1.1B`."""
    for unit in ("", "K", "M"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}B"


def memory_size(num_bytes: float) -> str:
    """`850 MB`, `1.2 GB`: decimal units, as memory is sold and as GPU tools show it."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
