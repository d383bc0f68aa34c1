"""After which steps a run measures, saves and generates samples: one rule for the loop and for the plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from lorafit.config.schema import Config


class Due(NamedTuple):
    """What follows a step."""

    measure: bool
    save: bool
    sample: bool


@dataclass(frozen=True, slots=True)
class Cadence:
    """Intervals in steps; 0 is once per epoch. Without `samples_every` there are no samples before the end."""

    eval_every: int
    save_every: int
    samples_every: int | None
    num_steps: int
    steps_per_epoch: int

    @classmethod
    def of(cls, config: Config, num_steps: int, steps_per_epoch: int) -> Cadence:
        """The intervals of a config."""
        train = config.train
        return cls(train.eval_every, train.save_every, config.run.samples_every, num_steps, steps_per_epoch)

    def at(self, step: int) -> Due:
        """What follows `step`, counted from 1. The last step is measured and saved; its samples come with the end.

        `num_steps` is 0 where time decides the length.
        """
        last = step == self.num_steps
        return Due(
            measure=last or self._divides(step, self.eval_every),
            save=last or self._divides(step, self.save_every),
            sample=not last and self.samples_every is not None and self._divides(step, self.samples_every),
        )

    def times(self) -> list[Due]:
        """What follows each step after which anything happens."""
        intervals = {self.eval_every, self.save_every, self.samples_every} - {None}
        spans = [every or self.steps_per_epoch for every in intervals]
        steps = {self.num_steps}.union(*(range(every, self.num_steps + 1, every) for every in spans))
        return [self.at(step) for step in sorted(steps)]

    def _divides(self, step: int, every: int) -> bool:
        return step % (every or self.steps_per_epoch) == 0
