"""What a run came to, read from its files: for `lorafit runs`, scripts and reports."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime

from lorafit.errors import LorafitError
from lorafit.observe.metrics_file import number, read_metrics
from lorafit.run_dir import RunDirectory
from lorafit.storage.locks import is_locked

ENDS = ("finished", "ended early", "interrupted")


@dataclass(frozen=True, slots=True)
class Summary:
    """One run in a line. Losses are None where nothing was measured yet."""

    model: str
    state: str  # running, finished, ended early, interrupted, stopped (ended without a word), unreadable
    step: int
    num_steps: int | None
    loss: float | None
    heldout_loss: float | None
    base_loss: float | None
    started: str  # local time, ISO 8601 to the minute

    def as_dict(self) -> dict[str, object]:
        """The fields, for JSON."""
        return asdict(self)

    def cells(self) -> list[str]:
        """The fields as people read them in a table."""
        steps = f"{self.step}/{self.num_steps}" if self.num_steps else str(self.step)
        losses = [
            f"{value:.3f}" if value is not None else "-"
            for value in (self.loss, self.heldout_loss, self.base_loss)
        ]
        return [self.model, self.state, steps, *losses, self.started]


def summarize(run: RunDirectory) -> Summary:
    """The summary of a run directory; one that cannot be read says so in its state."""
    started = datetime.fromtimestamp(run.started()).isoformat(" ", "minutes")
    try:
        model = run.config().model.name
        events = read_metrics(run.metrics_file) if run.metrics_file.exists() else []
    except LorafitError:
        return Summary("?", "unreadable", 0, None, None, None, None, started)
    by_kind: dict[str, list[dict[str, object]]] = {}
    for event in events:
        by_kind.setdefault(str(event.get("event")), []).append(event)

    def last(kind: str, field: str) -> object:
        return by_kind[kind][-1].get(field) if by_kind.get(kind) else None

    acts = [event for event in events if event.get("event") in ("run_started", "step", "run_ended")]
    if is_locked(run.lock_file):
        state = "running"
    elif acts and acts[-1].get("event") == "run_ended" and acts[-1].get("reason") in ENDS:
        state = str(acts[-1]["reason"])
    else:
        state = "stopped"
    best = [loss for event in by_kind.get("heldout", []) if (loss := number(event.get("loss"))) is not None]
    return Summary(
        model=model,
        state=state,
        step=int(number(last("step", "step")) or 0),
        num_steps=int(number(last("run_started", "num_steps")) or 0) or None,
        loss=number(last("step", "loss")),
        heldout_loss=min(best, default=None),
        base_loss=number(last("heldout", "base_loss")),
        started=started,
    )
