"""How long a run is: a number of steps that is planned, or as many steps as fit into a time budget."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from dataclasses import dataclass
from datetime import datetime

from lorafit.config.fields import budget_seconds, next_clock_time
from lorafit.config.schema import TrainSection
from lorafit.distributed.ranks import Ranks
from lorafit.errors import RunError
from lorafit.observe.units import duration
from lorafit.plan.cadence import Due
from lorafit.plan.predict import ENDS_SECONDS, Plan, save_seconds
from lorafit.training.optim import learning_rate

_FIRST_STEPS = 100  # of a run whose first step has not been timed
_RECENT = 9  # steps whose median is the time of the next one
clock, wall_clock = time.monotonic, time.time  # replaced in tests


@dataclass(slots=True)
class Budget:
    """The time budget of a run, a part of its state: what was used, and what the end needs. All in seconds.

    `total` is None and `until` (since 1970) set for a clock time. `used` is the time of the run's processes up to this
    state: of the first one from its start, of one that resumes from its first step. `began` is what was used before
    the first step. `ending` is for samples, export and proof, `measuring` for one held-out measurement, `saving` for
    one checkpoint. `progress` is the part of the training time that has passed, `last` the last step, once it is known.
    """

    text: str
    total: float | None
    until: float | None
    used: float = 0.0
    began: float | None = None
    ending: float = 0.0
    measuring: float = 0.0
    saving: float = 0.0
    progress: float = 0.0
    last: int | None = None

    @classmethod
    def of(cls, text: str) -> Budget:
        """The budget that `train.budget` names, from now."""
        total = budget_seconds(text)
        now = datetime.fromtimestamp(wall_clock())
        return cls(text, total, next_clock_time(text, now).timestamp() if total is None else None)

    def changed(self, text: str) -> Budget:
        """The budget after a resume with `text` as `train.budget`: what was used stays."""
        if text != self.text:
            new = Budget.of(text)
            self.text, self.total, self.until, self.last, self.progress = (
                text,
                new.total,
                new.until,
                None,
                0.0,
            )
        return self

    @property
    def left(self) -> float:
        """Seconds left for steps."""
        if self.until is not None:
            left = self.until - wall_clock()
        else:
            assert self.total is not None
            left = self.total - self.used
        return left - self.ending - self.measuring - self.saving


def begin(budget: Budget, plan: Plan, elapsed: float) -> str:
    """Set what a new run has used and what its end needs, by its measured plan; returns a line about it.

    Raises RunError where no time is left for a step.
    """
    budget.used = elapsed
    budget.saving = save_seconds(4 * plan.trainable)
    budget.ending = ENDS_SECONDS
    if plan.times is not None:
        budget.ending += plan.times.answering + plan.times.asking + plan.times.proving
    left = budget.left
    if left <= 0:
        needed = f"loading took {duration(elapsed)}, and the end needs about {duration(budget.ending)}"
        raise RunError(
            f"no time is left for a step: {needed}",
            place=f"train.budget={budget.text}",
            hint="give more time, or leave out parts of the end: run.verify=false run.samples=0",
        )
    end = datetime.fromtimestamp(wall_clock() + left + budget.ending + budget.saving)
    return (
        f"time budget {budget.text}: the run ends at about {end:%H:%M:%S}, without pauses; "
        f"{duration(left)} for steps, {duration(budget.ending)} for samples, export and proof"
    )


class Pace:
    """The rates of a run of `num_steps` steps, the last of which is number `num_steps`. Steps count from 0."""

    def __init__(self, train: TrainSection, num_steps: int, first_step: int = 0) -> None:
        self.num_steps = num_steps
        self._train, self._first = train, first_step

    def rate(self, step: int) -> float:
        """The learning rate of the step after `step` steps."""
        train, length = self._train, self.num_steps - self._first
        warmup = train.warmup_steps(length)
        return learning_rate(step - self._first, length, train.learning_rate, train.schedule, warmup)

    def count(self, step: int, due: Due, saving: float) -> Due:
        """Count a step, now `step` in all; returns what follows it. `saving` is what the last checkpoint took, in
        seconds (0: none was written).
        """
        return due

    def pause(self) -> None:
        """Count the time until now, before a save."""


class TimedPace(Pace):
    """As many steps as fit into a `budget`, by the clock of the first rank, which decides for all.

    The rate is that of a run whose part `progress` is done. A step is the last one where less than half of another one
    fits: the end is then right to half a step. `num_steps` is an estimate before.
    """

    def __init__(self, train: TrainSection, budget: Budget, step: int, ranks: Ranks) -> None:
        super().__init__(train, budget.last or step + 1)
        self._budget, self._ranks = budget, ranks
        self._origin = clock() - budget.used
        self._started = 0.0
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def rate(self, step: int) -> float:
        budget, train = self._budget, self._train
        self.pause()
        self._started = budget.used
        if budget.began is None:
            budget.began = budget.used
        spent, left = budget.used - budget.began, max(budget.left, 0.0)
        budget.progress = max(budget.progress, spent / (spent + left) if spent + left else 1.0)
        (progress,) = self._of_main(budget.progress)
        progress = min(progress, step / (step + 0.5))  # at least half a step is left
        length = step / progress if progress else self._first_length(left)
        warmup = train.warmup_steps(math.ceil(length))
        return learning_rate(step, length, train.learning_rate, train.schedule, warmup)

    def count(self, step: int, due: Due, saving: float) -> Due:
        budget = self._budget
        self.pause()
        budget.saving = saving or budget.saving
        self._recent.append(budget.used - self._started)
        left, one = budget.left, statistics.median(self._recent)
        more = 0 if left < one / 2 else max(1, round(left / one))
        # one measurement is reserved for the end, a second one must leave time for a step
        fits = due.measure and left - budget.measuring >= one / 2
        more, measures = map(int, self._of_main(more, fits))
        self.num_steps = step + more
        if more:
            return Due(bool(measures), due.save, due.sample)
        budget.last = step
        return Due(measure=True, save=True, sample=False)

    def pause(self) -> None:
        self._budget.used = clock() - self._origin

    def _first_length(self, left: float) -> float:
        return max(1.0, left / statistics.median(self._recent)) if self._recent else _FIRST_STEPS

    def _of_main(self, *values: float) -> list[float]:
        """The values of the first rank, on every rank."""
        return self._ranks.all_reduce_max([value if self._ranks.is_main else -math.inf for value in values])
