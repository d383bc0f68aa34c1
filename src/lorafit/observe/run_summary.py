"""The state and the results of a run, read from its files: for `lorafit runs`, sweeps, resuming and reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from lorafit.errors import LorafitError, RunError
from lorafit.observe.metrics_file import number, read_whole_events, series
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import MANIFEST
from lorafit.storage.locks import is_locked

Metrics = tuple[Sequence[Mapping[str, Any]], int]  # events, oldest first, and the number of damaged lines


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
    def of(cls, run: RunDirectory, metrics: Metrics | None = None) -> RunState:
        """The state of `run`; `metrics` is what `read_whole_events` returned, where the caller has it.

        An end in the metrics counts also while the run is locked: its own process still writes the report then. A
        complete run has an adapter, whose bytes are not verified here.
        """
        try:
            events, num_damaged = metrics or read_whole_events(run.metrics_file)
        except RunError:
            return cls.UNREADABLE
        if num_damaged and not events:
            return cls.UNREADABLE
        kinds = ("run_started", "step", "run_ended")
        last = next((event for event in reversed(events) if event.get("event") in kinds), {})
        if last.get("event") == "run_ended":
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
    heldout_loss: float | None  # the lowest
    base_loss: float | None
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
        return [self.model, self.state, steps, *losses, self.started]


def summarize(run: RunDirectory, metrics: Metrics | None = None) -> Summary:
    """The summary of a run directory, `unreadable` where its config or its metrics cannot be read."""
    model, state = "?", RunState.UNREADABLE
    with suppress(LorafitError):
        metrics = metrics or read_whole_events(run.metrics_file)
        model = run.config().model.name
        state = RunState.of(run, metrics)
    events = metrics[0] if metrics else ()

    def last(kind: str, field: str) -> float | None:
        values = [event.get(field) for event in events if event.get("event") == kind]
        return number(values[-1]) if values else None

    heldout = series((event for event in events if event.get("event") == "heldout"), "loss")
    return Summary(
        model=model,
        state=state,
        step=int(last("step", "step") or 0),
        num_steps=int(last("run_started", "num_steps") or 0) or None,
        loss=last("step", "loss"),
        heldout_loss=min((loss for _, loss in heldout), default=None),
        base_loss=last("heldout", "base_loss"),
        started=datetime.fromtimestamp(run.started()).isoformat(" ", "minutes"),
    )
