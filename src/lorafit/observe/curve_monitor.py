"""What curves say in plain words: the loss jumps, climbs or stands still, gradients explode, rows are learnt by heart.

A pure function of the events so far. Thresholds are wide: what is said here should be worth stopping a run for.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorafit.observe.events import Diagnosis, Event, Heldout, Observer, Step

WINDOW = 50  # steps that count as "lately"
LEAST = 20  # steps before anything is said
QUIET = 200  # steps before the same thing is said again
_SPIKE, _SPIKE_DEVIATIONS, _SPIKE_LEAST = 1.75, 6.0, 0.3
_TINY, _FAR = 1e-6, 50.0
_CLIMB, _CLIMB_LEAST, _CLIMB_DEVIATIONS = 1.35, 0.3, 1.25
_DIVERGED, _DIVERGED_DEVIATIONS = 2.0, 2.0
_AT_START = 3  # steps of which the loss is the untrained model's: a rate too high ruins it within a few
_EXPLODED, _EXPLODED_STEPS = 20.0, 3
_MOVED, _SURE, _FULL_RATE, _NOTHING_TO_LEARN = 0.98, 0.02, 0.3, 0.2
_STILL, _STILL_TIMES = 0.002, 5
_WORSE, _WORSE_LEAST = 1.03, 0.02
_LOWER_RATE = "try train.learning_rate={:.1g}"


@dataclass(slots=True)
class CurveMonitor:
    """Looks at one event after the other; what it keeps is bounded."""

    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    first: list[float] = field(default_factory=list)  # losses of the first steps
    blocks: list[float] = field(default_factory=list)  # mean losses of every WINDOW steps
    lowest: float | None = None  # of the medians of WINDOW losses
    num_steps: int = 0
    peak_rate: float = 0.0
    rate: float = 0.0
    num_exploded: int = 0
    heldout: list[tuple[int, float, float]] = field(
        default_factory=list
    )  # step, loss, mean training loss then
    said: dict[str, int] = field(default_factory=dict)  # what was said, and at which step last

    @classmethod
    def over(cls, events: Iterable[Mapping[str, Any]]) -> CurveMonitor:
        """A watch that has seen the events of a metrics.jsonl, as it stands when a run goes on."""
        watch = cls()
        for event in events:
            try:
                match event.get("event"):
                    case "step":
                        watch._step(event["step"], event["loss"], event["grad_norm"], event["learning_rate"])
                    case "heldout":
                        watch._heldout(event["step"], event["loss"], event.get("base_loss"))
            except (KeyError, TypeError):  # a number that JSON does not have, or a line of another version
                continue
        return watch

    def look(self, event: Event) -> list[Diagnosis]:
        """What `event` shows that was not said lately."""
        match event:
            case Step():
                return self._step(event.step, event.loss, event.grad_norm, event.learning_rate)
            case Heldout():
                return self._heldout(event.step, event.loss, event.base_loss)
        return []

    def _step(self, step: int, loss: float, norm: float, rate: float) -> list[Diagnosis]:
        found: list[Diagnosis | None] = []
        self.rate, self.peak_rate = rate, max(self.peak_rate, rate)
        if len(self.losses) >= LEAST:
            found += [self._spike(step, loss), self._explosion(step, norm)]
        self.losses.append(loss)
        self.norms.append(norm)
        self.num_steps += 1
        if self.num_steps % WINDOW == 0:
            self.blocks.append(_mean(self.losses))
        if len(self.first) < _AT_START:
            self.first.append(loss)
        if len(self.losses) >= LEAST:
            found += [self._climb(step), self._no_start(step)]
        return [one for one in found if one is not None]

    def _spike(self, step: int, loss: float) -> Diagnosis | None:
        usual = statistics.median(self.losses)
        logs = [math.log(max(one, _TINY)) for one in self.losses]  # where the noise of a loss is symmetric
        middle = statistics.median(logs)
        factor = math.exp(min(_SPIKE_DEVIATIONS * _deviation(logs, middle), _FAR))
        limit = max(usual * max(_SPIKE, factor), usual + _SPIKE_LEAST)
        if loss <= limit:
            return None
        text = f"the loss jumped to {loss:.3g} from about {usual:.3g}"
        hint = "look at the rows of this step; if it stays up, " + self._lower_rate()
        return self._say("spike", step, text, hint)

    def _explosion(self, step: int, norm: float) -> Diagnosis | None:
        usual = statistics.median(self.norms)
        self.num_exploded = self.num_exploded + 1 if norm > _EXPLODED * usual > 0 else 0
        if self.num_exploded < _EXPLODED_STEPS:
            return None
        text = f"the gradient's norm exploded to {norm:.3g} from about {usual:.3g}"
        return self._say(
            "gradient explosion", step, text, f"{self._lower_rate()}, or a lower train.max_grad_norm"
        )

    def _climb(self, step: int) -> Diagnosis | None:
        usual = statistics.median(self.losses)
        if len(self.losses) == WINDOW:
            self.lowest = usual if self.lowest is None else min(usual, self.lowest)
        lately = list(self.losses)[-LEAST:]
        now, begun = statistics.median(lately), statistics.median(self.first)
        noise = _deviation(self.losses, usual)
        least = max(_CLIMB_LEAST, _CLIMB_DEVIATIONS * noise)
        if now > max(_DIVERGED * begun, begun + max(_CLIMB_LEAST, _DIVERGED_DEVIATIONS * noise)):
            text = f"the loss diverges: {now:.3g} after it began at {begun:.3g}"
        elif self.lowest is not None and usual > max(_CLIMB * self.lowest, self.lowest + least):
            text = f"the loss climbs: {usual:.3g} after it was down to {self.lowest:.3g}"
        else:
            return None
        return self._say("divergence", step, text, f"the learning rate is too high: {self._lower_rate()}")

    def _no_start(self, step: int) -> Diagnosis | None:
        quarter = len(self.blocks) // 4
        if not quarter or self.num_steps % WINDOW or self.rate < _FULL_RATE * self.peak_rate:
            return None
        begun, lately = _mean(self.blocks[:quarter]), _mean(self.blocks[-quarter:])
        noise = _deviation(self.losses, statistics.median(self.losses)) * math.sqrt(2 / (quarter * WINDOW))
        if (
            begun < _NOTHING_TO_LEARN
            or noise > _SURE * begun
            or not _MOVED * begun <= lately <= _CLIMB * begun
        ):
            return None
        text = f"after {self.num_steps} steps the loss has hardly moved ({begun:.3g} to {lately:.3g})"
        hint = f"is the learning rate ({self.peak_rate:.1g}) too low, or the answer not what is trained?"
        return self._say("plateau", step, text, hint)

    def _heldout(self, step: int, loss: float, base: float | None) -> list[Diagnosis]:
        training = _mean(list(self.losses)[-LEAST:]) if self.losses else loss
        self.heldout.append((step, loss, training))
        best_step, best, training_then = min(self.heldout, key=lambda measured: measured[1])
        since = sum(measured[0] > best_step for measured in self.heldout)
        found: list[Diagnosis | None] = []
        if base is not None and loss > _WORSE * base and loss > base + _WORSE_LEAST:
            text = f"the held-out loss ({loss:.3g}) is above that of the untrained model ({base:.3g})"
            found.append(self._say("worse than base", step, text, self._lower_rate()))
        elif since >= 2 and loss > _WORSE * best and loss > best + _WORSE_LEAST and training < training_then:
            text = (
                f"rows are learnt by heart: the training loss falls ({training_then:.3g} to {training:.3g}), "
                f"the held-out loss rises ({best:.3g} at step {best_step}, now {loss:.3g})"
            )
            found.append(
                self._say("overfit", step, text, "fewer epochs, more rows, lora.dropout, or train.patience=3")
            )
        elif self.rate >= _FULL_RATE * self.peak_rate and len(self.heldout) >= _STILL_TIMES:
            lately = [measured[1] for measured in self.heldout[-_STILL_TIMES:]]
            if max(lately) - min(lately) <= _STILL * min(lately):
                text = f"the held-out loss has stood still at {loss:.3g} for {_STILL_TIMES} measurements"
                found.append(self._say("plateau", step, text, "train.patience=3 would end the run here"))
        return [one for one in found if one is not None]

    def _lower_rate(self) -> str:
        return _LOWER_RATE.format(self.peak_rate / 3)

    def _say(self, what: str, step: int, text: str, hint: str) -> Diagnosis | None:
        before = self.said.get(what)
        self.said[what] = step  # it stays quiet as long as it lasts
        return None if before is not None and step - before < QUIET else Diagnosis(step, what, text, hint)


def diagnose(events: Iterable[Event]) -> list[Diagnosis]:
    """All that a watch says over `events`."""
    watch = CurveMonitor()
    return [found for event in events for found in watch.look(event)]


def diagnosing(observe: Observer, watch: CurveMonitor) -> Observer:
    """`observe` that is also told what `watch` finds in the events, after each."""

    def observe_and_look(event: Event) -> None:
        observe(event)
        for found in watch.look(event):
            observe(found)

    return observe_and_look


def _deviation(values: Sequence[float] | deque[float], middle: float) -> float:
    """A standard deviation that single values far away do not move."""
    return 1.4826 * statistics.median(abs(one - middle) for one in values)


def _mean(values: Sequence[float] | deque[float]) -> float:
    return sum(values) / len(values)
