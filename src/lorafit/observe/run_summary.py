"""The state and the results of a run, read from its files: for `lorafit runs`, sweeps, resuming and reports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args

from lorafit.errors import LorafitError, RunError
from lorafit.observe.events import LearnedLevel
from lorafit.observe.metrics_file import STEP, event_of, number, read_raw_lines
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import MANIFEST
from lorafit.storage.locks import is_locked

_DECIDING = ("run_started", "step", "run_ended")


@dataclass(slots=True)
class Overview:
    """What the state and the summary of a run need of its metrics: a few events, however long the file is."""

    newest: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # the last event of each kind below
    last: str = ""  # the kind of the last event that decides the state
    best: float | None = None  # held-out loss of the best step
    num_damaged: int = 0
    has_events: bool = False

    @classmethod
    def read(cls, path: Path) -> Overview:
        """Read a metrics file; of the lines of steps only the last is parsed. Raises RunError as `read_raw_lines`."""
        overview = cls()
        return overview if overview.extend(read_raw_lines(path)) else cls._of_all(path)

    def extend(self, lines: Iterable[bytes]) -> bool:
        """Take the next lines; of those of steps only the last is parsed. False where that one is damaged."""
        newest = b""
        for line in lines:
            if line.startswith(STEP):
                newest, self.last = line, "step"
            else:
                self.add(event_of(line))
        event = event_of(newest) if newest else {}
        if event:
            last = self.last
            self.add(event)
            self.last = last
        return event is not None

    @classmethod
    def _of_all(cls, path: Path) -> Overview:
        overview = cls()
        for line in read_raw_lines(path):
            overview.add(event_of(line))
        return overview

    def add(self, event: Mapping[str, Any] | None) -> None:
        """Take the next event, None for a damaged line."""
        if event is None:
            self.num_damaged += 1
            return
        self.has_events = True
        if (kind := event.get("event")) in _DECIDING:
            self.last = str(kind)
        if kind in (*_DECIDING, "heldout", "learned", "refit"):
            self.newest[str(kind)] = event
        if kind == "heldout" and number(event.get("step")) is not None:
            loss = number(event.get("loss"))
            if loss is not None and (event.get("best") is True or self.best is None or loss < self.best):
                self.best = loss

    def number(self, kind: str, name: str) -> float | None:
        """A number of the last event of a kind."""
        return number(self.newest.get(kind, {}).get(name))


class RunState(StrEnum):
    """The state of a run. Nothing else in the program decides whether a run is finished."""

    RUNNING = "running"
    FINISHED = "finished"
    ENDED_EARLY = "ended early"
    INTERRUPTED = "interrupted"
    STOPPED = "stopped"  # its process ended before the run did
    UNREADABLE = "unreadable"

    @property
    def is_complete(self) -> bool:
        """Whether there is nothing left to do."""
        return self in (RunState.FINISHED, RunState.ENDED_EARLY)

    @classmethod
    def of(cls, run: RunDirectory, metrics: Overview | None = None) -> RunState:
        """The state of `run`; `metrics` is the overview of its metrics, where the caller has it.

        An end in the metrics counts also while the run is locked: its own process still writes the report then. A
        complete run has an adapter, whose bytes are not verified here.
        """
        try:
            metrics = metrics or Overview.read(run.metrics_file)
        except RunError:
            return cls.UNREADABLE
        if metrics.num_damaged and not metrics.has_events:
            return cls.UNREADABLE
        if metrics.last == "run_ended":
            last = metrics.newest["run_ended"]
            has_adapter = (run.adapter / MANIFEST).is_file()
            for state in (cls.FINISHED, cls.ENDED_EARLY, cls.INTERRUPTED):
                if last.get("reason") == state and (has_adapter or not state.is_complete):
                    return state
        return cls.RUNNING if is_locked(run.lock_file) else cls.STOPPED


@dataclass(frozen=True, slots=True)
class Summary:
    """One run in a line. Losses are None where nothing was measured yet."""

    model: str
    state: RunState
    step: int
    num_steps: int | None
    loss: float | None
    heldout_loss: float | None  # of the best step
    base_loss: float | None
    learned: str  # learned, partly, nothing or unknown; "" before the end
    started: str  # local time, ISO 8601 to the minute

    def as_dict(self) -> dict[str, object]:
        """The fields, for JSON."""
        return asdict(self)

    def cells(self) -> list[str]:
        """The fields as text, for a table."""
        steps = f"{self.step}/{self.num_steps}" if self.num_steps else str(self.step)
        losses = [
            f"{value:.3f}" if value is not None else "-"
            for value in (self.loss, self.heldout_loss, self.base_loss)
        ]
        return [self.model, self.state, steps, *losses, self.learned or "-", self.started]


def summarize(run: RunDirectory, metrics: Overview | None = None) -> Summary:
    """The summary of a run directory, `unreadable` where its model's name or its metrics cannot be read."""
    model, state = "?", RunState.UNREADABLE
    with suppress(LorafitError):
        metrics = metrics or Overview.read(run.metrics_file)
        model = run.model_name()
        state = RunState.of(run, metrics)
    found = metrics or Overview()
    stored_level = found.newest.get("learned", {}).get("level")
    return Summary(
        model=model,
        state=state,
        step=int(found.number("step", "step") or 0),
        num_steps=int(found.number("refit", "num_steps") or found.number("run_started", "num_steps") or 0)
        or None,
        loss=found.number("step", "loss"),
        heldout_loss=found.best,
        base_loss=found.number("heldout", "base_loss"),
        learned=next((level for level in get_args(LearnedLevel) if level == stored_level), ""),
        started=datetime.fromtimestamp(run.started()).isoformat(" ", "minutes"),
    )
