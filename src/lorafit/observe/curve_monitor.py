"""Diagnosis of the curves: the loss jumps, rises or does not move, gradients explode, the run overfits.

The thresholds are wide: a diagnosis should be a reason to stop a run.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from lorafit.observe.events import Diagnosis, Event, Observer

WINDOW = 50  # steps that are recent
LEAST = 20  # steps before the first diagnosis
QUIET = 200  # steps before the same diagnosis is repeated
_SPIKE, _SPIKE_DEVIATIONS, _SPIKE_LEAST = 1.75, 6.0, 0.3
_TINY, _FAR = 1e-6, 50.0
_CLIMB, _CLIMB_LEAST, _CLIMB_DEVIATIONS = 1.35, 0.3, 1.25
_DIVERGED, _DIVERGED_DEVIATIONS = 2.0, 2.0
_AT_START = 3  # steps with the loss of the untrained model: a rate that is too high raises it within a few
_EXPLODED, _EXPLODED_STEPS = 20.0, 3
_MOVED, _SURE, _FULL_RATE, _NOTHING_TO_LEARN = 0.98, 0.02, 0.3, 0.2
_STILL, _STILL_TIMES = 0.002, 5
_WORSE, _WORSE_LEAST = 1.03, 0.02
_Problem = tuple[str, str, str]  # what, text and hint of a diagnosis


def _recent() -> deque[float]:
    return deque(maxlen=WINDOW)


@dataclass(slots=True)
class CurveMonitor:
    """Reads one event after the other and keeps a bounded state. `tolerance` is `train.tolerance`."""

    tolerance: float = 0.0
    losses: deque[float] = field(default_factory=_recent)
    norms: deque[float] = field(default_factory=_recent)
    first: list[float] = field(default_factory=list)  # losses of the first steps
    blocks: list[float] = field(default_factory=list)  # mean loss of each WINDOW steps
    lowest: float | None = None  # of the medians of WINDOW losses
    num_steps: int = 0
    peak_rate: float = 0.0
    rate: float = 0.0
    num_exploded: int = 0
    heldout: list[tuple[int, float, float]] = field(default_factory=list)  # step, loss, training loss then
    last_seen: dict[str, int] = field(default_factory=dict)  # the last step of each diagnosis

    @classmethod
    def over(cls, events: Iterable[Mapping[str, Any]], tolerance: float = 0.0) -> CurveMonitor:
        """A monitor that has read the events of a metrics.jsonl, for a run that is resumed."""
        monitor = cls(tolerance)
        for event in events:
            with suppress(KeyError, TypeError):  # not a number of JSON, or a line of another version
                monitor.look(event)
        return monitor

    def look(self, event: Mapping[str, Any]) -> list[Diagnosis]:
        """The diagnoses that follow from an event, without those of the last QUIET steps."""
        kind = event.get("event")
        if kind == "refit":  # the run begins again: its first losses are high
            self.__init__(self.tolerance)  # type: ignore[misc]
        if kind not in ("step", "heldout"):
            return []
        step, loss = event["step"], event["loss"]
        if kind == "step":
            problems = self._step(loss, event["grad_norm"], event["learning_rate"])
        else:
            problems = self._heldout(step, loss, event.get("base_loss"))
        quiet_for = {what: step - self.last_seen.get(what, -math.inf) for what, _, _ in problems}
        self.last_seen |= dict.fromkeys(quiet_for, step)  # it is not repeated while it lasts
        return [Diagnosis(step, *problem) for problem in problems if quiet_for[problem[0]] >= QUIET]

    def _step(self, loss: float, norm: float, rate: float) -> list[_Problem]:
        problems: list[_Problem | None] = []
        self.rate, self.peak_rate = rate, max(self.peak_rate, rate)
        if len(self.losses) >= LEAST:
            problems += [self._spike(loss), self._explosion(norm)]
        self.losses.append(loss)
        self.norms.append(norm)
        self.num_steps += 1
        if self.num_steps % WINDOW == 0:
            self.blocks.append(statistics.fmean(self.losses))
        if len(self.first) < _AT_START:
            self.first.append(loss)
        if len(self.losses) >= LEAST:
            problems += [self._climb(), self._no_start()]
        return [problem for problem in problems if problem]

    def _spike(self, loss: float) -> _Problem | None:
        usual = statistics.median(self.losses)
        # the noise of a loss is symmetric in its log
        logs = [math.log(max(one, _TINY)) for one in self.losses]
        factor = math.exp(min(_SPIKE_DEVIATIONS * _deviation(logs), _FAR))
        if loss <= max(usual * max(_SPIKE, factor), usual + _SPIKE_LEAST):
            return None
        text = f"the loss jumped to {loss:.3g} from about {usual:.3g}"
        hint = f"look at the rows of this step; if it stays high, {self._lower_rate()}"
        return "spike", text, hint

    def _explosion(self, norm: float) -> _Problem | None:
        usual = statistics.median(self.norms)
        self.num_exploded = self.num_exploded + 1 if norm > _EXPLODED * usual > 0 else 0
        if self.num_exploded < _EXPLODED_STEPS:
            return None
        text = f"the gradient's norm exploded to {norm:.3g} from about {usual:.3g}"
        hint = f"{self._lower_rate()}, or a lower train.max_grad_norm"
        return "gradient explosion", text, hint

    def _climb(self) -> _Problem | None:
        usual, noise = statistics.median(self.losses), _deviation(self.losses)
        if len(self.losses) == WINDOW:
            self.lowest = usual if self.lowest is None else min(usual, self.lowest)
        now, first = statistics.median(list(self.losses)[-LEAST:]), statistics.median(self.first)
        least = max(_CLIMB_LEAST, _CLIMB_DEVIATIONS * noise)
        if now > max(_DIVERGED * first, first + max(_CLIMB_LEAST, _DIVERGED_DEVIATIONS * noise)):
            text = f"the loss diverges: {now:.3g} after it began at {first:.3g}"
        elif self.lowest is not None and usual > max(_CLIMB * self.lowest, self.lowest + least):
            text = f"the loss rises: {usual:.3g} after it was down to {self.lowest:.3g}"
        else:
            return None
        hint = f"the learning rate is too high: {self._lower_rate()}"
        return "divergence", text, hint

    def _no_start(self) -> _Problem | None:
        quarter = len(self.blocks) // 4
        if not quarter or self.num_steps % WINDOW or self.rate < _FULL_RATE * self.peak_rate:
            return None
        first, last = statistics.fmean(self.blocks[:quarter]), statistics.fmean(self.blocks[-quarter:])
        noise = _deviation(self.losses) * math.sqrt(2 / (quarter * WINDOW))
        has_moved = not _MOVED * first <= last <= _CLIMB * first
        if has_moved or first < _NOTHING_TO_LEARN or noise > _SURE * first:
            return None
        text = f"after {self.num_steps} steps the loss has hardly moved ({first:.3g} to {last:.3g})"
        hint = f"is the learning rate ({self.peak_rate:.1g}) too low, or is the answer not what is trained?"
        return "plateau", text, hint

    def _heldout(self, step: int, loss: float, base: float | None) -> list[_Problem]:
        training = statistics.fmean(list(self.losses)[-LEAST:]) if self.losses else loss
        self.heldout.append((step, loss, training))
        best_step, best, training_then = min(self.heldout, key=lambda measured: measured[1])
        num_later = sum(measured[0] > best_step for measured in self.heldout)
        is_worse = loss > max(_WORSE, 1 + self.tolerance) * best and loss > best + _WORSE_LEAST
        recent = [measured[1] for measured in self.heldout[-_STILL_TIMES:]]
        if base is not None and loss > _WORSE * base and loss > base + _WORSE_LEAST:
            text = f"the held-out loss ({loss:.3g}) is above that of the untrained model ({base:.3g})"
            return [("worse than base", text, self._lower_rate())]
        if num_later >= 2 and is_worse and training < training_then:
            text = (
                f"the run overfits: the training loss falls ({training_then:.3g} to {training:.3g}), "
                f"the held-out loss rises ({best:.3g} at step {best_step}, now {loss:.3g})"
            )
            hint = "fewer epochs, more rows, lora.dropout, or train.patience=3"
            return [("overfit", text, hint)]
        if (
            len(recent) == _STILL_TIMES
            and self.rate >= _FULL_RATE * self.peak_rate
            and max(recent) - min(recent) <= _STILL * min(recent)
        ):
            text = f"the held-out loss has stayed at {loss:.3g} for {_STILL_TIMES} measurements"
            return [("plateau", text, "train.patience=3 would end the run here")]
        return []

    def _lower_rate(self) -> str:
        return f"try train.learning_rate={self.peak_rate / 3:.1g}"


def diagnosing(observe: Observer, monitor: CurveMonitor) -> Observer:
    """An observer that passes each event to `observe`, followed by the diagnoses of `monitor`."""

    def observe_and_look(event: Event) -> None:
        observe(event)
        for diagnosis in monitor.look(event.as_dict()):
            observe(diagnosis)

    return observe_and_look


def _deviation(values: Sequence[float] | deque[float]) -> float:
    """A standard deviation that single outliers do not change."""
    middle = statistics.median(values)
    return 1.4826 * statistics.median(abs(one - middle) for one in values)
