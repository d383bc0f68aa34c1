"""The observer that shows a run: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lorafit.observe.console import LiveLine, can_redraw, clean_line, console_of, print_line, side_by_side
from lorafit.observe.events import (
    Answers,
    Diagnosis,
    Drift,
    Event,
    Heldout,
    Learned,
    Message,
    Preferences,
    Progress,
    Proved,
    Refit,
    RunEnded,
    RunStarted,
    Sample,
    Saved,
    Step,
)
from lorafit.observe.meters import Meter
from lorafit.observe.units import count, duration, memory_size, short_count

MIN_BAR_WIDTH = 8
# left out of a short line
LEAST_IMPORTANT_FIRST = ("elapsed", "memory", "learning_rate", "speed", "eta", "loss")
SAMPLE_CHARACTERS = 240
LEVEL_STYLES = {"learned": "bold green", "partly": "bold yellow", "nothing": "bold red", "unknown": ""}


class Terminal:
    """Shows a run: a live line on a terminal, plain lines every `log_every` steps elsewhere.

    The loss is that of the step, as in metrics.jsonl. `close` removes the live line.
    """

    def __init__(self, stream: TextIO | None = None, *, log_every: int = 10) -> None:
        self._stream = stream or sys.stderr
        self._console = console_of(self._stream)
        self._live: LiveLine | None = None
        self._line: _Line | None = None
        self._is_closed = False
        self._log_every = log_every
        self._meter = Meter()
        self._started = time.monotonic()
        self._answer: str | None = None  # the last that was printed
        self._lowest = math.inf  # held-out loss

    def __call__(self, event: Event) -> None:
        if self._is_closed:
            return
        try:
            self._show(event)
        except (OSError, ValueError):  # the terminal or the pipe was closed: the run continues
            self._is_closed = True

    def _show(self, event: Event) -> None:
        match event:
            case RunStarted():
                part = 100 * event.num_trainable / max(event.num_parameters, 1)
                counts = f"{short_count(event.num_parameters)} parameters, {short_count(event.num_trainable)} trained"
                self._print(f"{event.model}  {counts} ({part:.2g} %)  {event.device} {event.dtype}")
                length = f"  {count(event.num_steps, 'step')}" if event.num_steps else ""
                self._print(f"{count(event.num_rows, 'row')}{length}  output {event.output}")
                self._started = time.monotonic()
            case Step():
                self._step(event)
            case Heldout():
                base = "" if event.base_loss is None else f" (base {event.base_loss:.3f})"
                self._print(f"step {event.step}  held-out loss {event.loss:.3f}{base}{self._rank(event)}")
            case Preferences(drift=float(drift)):
                self._print(f"drift from the starting point {drift:.4f} nats per token of held-out answers")
            case Preferences(rows="heldout"):
                margin = "" if event.margin is None else f"margin {event.margin:.3f}  "
                self._print(f"step {event.step}  held-out {margin}in order {event.accuracy:.1%}")
            case Drift():
                moved = f"{event.divergence:.3g} nats, {100 * event.changed:.3g} % of greedy tokens changed"
                self._print(f"step {event.step}  drift from the base {moved}")
            case Refit():
                steps = event.num_steps - event.step
                loss = "" if event.heldout_loss is None else f" (held-out loss {event.heldout_loss:.3f})"
                self._print(
                    f"the held-out rows chose the length of step {event.chosen_step}{loss}: "
                    f"now {count(steps, 'step')} on all {count(event.num_rows, 'row')}, from the beginning"
                )
            case Saved(reason="best"):
                pass  # the line of the measurement says it
            case Saved():
                self._print(f"step {event.step}  saved {event.path} ({event.reason})")
            case Progress():
                if can_redraw(self._console):  # elsewhere its result is a line
                    text = clean_line(f"{event.what} {event.done}/{event.total}", self._console)
                    self._draw(_Line(event.done, event.total, lambda: {"step": text}))
            case Sample():
                self._sample(event)
            case Answers():
                self._answers(event)
            case Proved():
                self._proved(event)
            case Learned():
                self.close()
                self._print(event.text, style=LEVEL_STYLES[event.level])
            case Message(level="warning"):
                self._print(f"warning: {event.text}", style="yellow")
            case Message():
                self._print(event.text)
            case Diagnosis():
                self._print(f"step {event.step}  {event.text}: {event.hint}", style="yellow")
            case RunEnded():
                self.close()
                self._print(f"{event.reason} after {count(event.step, 'step')} in {duration(event.seconds)}")
                self._print(f"adapter {event.adapter}")

    def close(self) -> None:
        """Remove the live line."""
        if self._live is not None:
            live, self._live = self._live, None
            with contextlib.suppress(OSError, ValueError):  # the terminal was closed
                live.stop()

    def _step(self, event: Step) -> None:
        self._meter.update(event.tokens, event.seconds)
        eta = self._meter.eta(event.num_steps - event.step)
        if can_redraw(self._console):
            self._draw(_Line(event.step, event.num_steps, lambda: _parts(event, eta, self._started)))
        elif event.step % self._log_every == 0 or event.step == event.num_steps:
            self._print("  ".join(_parts(event, eta).values()))

    def _rank(self, event: Heldout) -> str:
        """What a measurement means for the choice of the step (`train.tolerance`)."""
        is_lowest, self._lowest = event.loss <= self._lowest, min(self._lowest, event.loss)
        if not event.best:
            return ""
        return (
            "  best so far"
            if is_lowest
            else f"  within train.tolerance of the lowest, {self._lowest:.3f}: preferred, as it is later"
        )

    def _draw(self, line: _Line) -> None:
        """Draw `line` in place of the live line."""
        self._line = line
        if self._live is None:
            self._live = LiveLine(self._console, lambda: self._line or "")
            self._live.start(refresh=True)

    def _sample(self, event: Sample) -> None:
        self.close()
        side_by_side(event.prompt, _beginning(event.base), _beginning(event.tuned), stream=self._stream)

    def _answers(self, event: Answers) -> None:
        """The first prompt and its answer in one line, if the answer has changed; the report has all of them."""
        if event.prompts and event.tuned[0] != self._answer:
            self._answer = event.tuned[0]
            prompt, answer = (" ".join(text.split()) for text in (event.prompts[0], self._answer))
            self._print(f"step {event.step}  {_short(prompt)} -> {_short(answer)}")

    def _proved(self, event: Proved) -> None:
        self.close()
        for number, line in enumerate(event.lines, 1):
            took = f"  ({duration(event.seconds)})" if number == len(event.lines) else ""
            self._print(f"proof  {line}{took}")
        failed = event.verdict == "fail"
        for fault in event.faults:
            self._print(f"{'error' if failed else 'warning'}: {fault}", style="red" if failed else "yellow")
        if failed:
            self._print(
                " hint: the adapter is kept, but it is not the one that was trained; proof.json has the numbers"
            )

    def _print(self, line: str, style: str = "") -> None:
        print_line(self._console, line, style)


def _parts(event: Step, eta: float, started: float | None = None) -> dict[str, str]:
    """The pieces of a progress line by name, in their order on the line."""
    parts = {
        "step": f"step {event.step}/{event.num_steps}",
        "loss": f"loss {event.loss:.3f}",
        "learning_rate": f"lr {event.learning_rate:.1e}",
        "speed": f"{event.tokens_per_second:,.0f} tokens/s",
    }
    if started is not None:
        parts["elapsed"] = duration(time.monotonic() - started)
    return {**parts, "eta": f"eta {duration(eta)}", "memory": memory_size(event.memory_bytes)}


@dataclass(frozen=True, slots=True)
class _Line:
    """The parts that fit the width of the terminal, and a bar in the rest. It asks for `parts` at each redraw."""

    done: int
    total: int
    parts: Callable[[], dict[str, str]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        parts = self.parts()
        for name in LEAST_IMPORTANT_FIRST:
            if MIN_BAR_WIDTH + sum(len(part) + 2 for part in parts.values()) <= options.max_width:
                break
            parts.pop(name, None)
        before, after = parts.pop("step") + "  ", "".join("  " + part for part in parts.values())
        bar = ProgressBar(self.total, self.done, max(options.max_width - len(before) - len(after), 1))
        line = Table.grid()
        line.add_row(Text(before, style="bold"), bar, Text(after))
        yield line


def _beginning(answer: str) -> str:
    """The beginning of an answer; samples.json has all of it."""
    return answer if len(answer) <= SAMPLE_CHARACTERS else answer[:SAMPLE_CHARACTERS].rstrip() + " [...]"


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
