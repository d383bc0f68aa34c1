"""The numbers of a step, its loss, its norm and the losses of its rows: read at once, or from a GPU one step late.

With late numbers step n + 1 is launched before those of step n are read, so the device never waits for the host. It
decides itself whether a step is taken: from one with a number that is not finite on it changes no weight, until the
host has read that and begins again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorafit.data.batch import Batch
from lorafit.distributed.ranks import Ranks
from lorafit.errors import TrainingError
from lorafit.model.device import device_memory_bytes
from lorafit.observe.events import Step
from lorafit.observe.meters import Meter
from lorafit.training.checkpoint import TrainState
from lorafit.training.loss_scale import LossScale

if TYPE_CHECKING:
    from lorafit.training.loop import TrainContext
    from lorafit.training.objective import Passes

Numbers = tuple[
    float, float, NDArray[np.float64]
]  # mean loss, norm before clipping, losses of the rows (2, rows)


class Unread:
    """The losses and the norm of a step on the device, and their copy in pinned memory."""

    def __init__(
        self,
        losses: Sequence[Tensor],
        of_targets: Sequence[Tensor],
        norm: Tensor,
        passes: Passes | None = None,
    ) -> None:
        """`losses` () are the sums of the passes, `of_targets` (targets,) the losses of each target of a pass. `passes`
        are those of a method that compares answers.
        """
        self.passes = passes
        sums = norm.new_empty(0) if passes is None else passes.sums()
        numbers = torch.cat([torch.stack(list(losses)), norm.reshape(1), sums, *of_targets])
        self._sizes = len(losses), 1, len(sums), numbers.numel() - len(losses) - 1 - len(sums)
        self.is_finite = torch.isfinite(numbers[: len(losses) + 1]).all()
        self._host = torch.empty(numbers.shape, dtype=numbers.dtype).pin_memory()
        self._host.copy_(numbers, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def read(self, batch: Batch, ranks: Ranks) -> tuple[Numbers, list[float]]:
        """The numbers of all ranks, and the sums of this rank's `passes`, when the device has computed them."""
        self._copied.synchronize()
        losses, norm, sums, of_targets = self._host.split(self._sizes)
        each = by_rows(batch, of_targets.numpy())
        total, *row_losses = ranks.all_reduce_sum([sum(losses.tolist()), *each.flat])
        rows = of_rows(np.reshape(row_losses, each.shape))
        return (total / batch.weight, norm.item(), rows), sums.tolist()


@dataclass(frozen=True, slots=True)
class Launched:
    """A step, number `step`, and the random state and the loss scale before it."""

    step: int
    batch: Batch
    rate: float
    num_steps: int
    started: float
    numbers: Unread | Numbers
    random: Tensor
    scale: LossScale


class Trail:
    """The last step of a run, until its numbers are read and reported."""

    def __init__(self, job: TrainContext, state: TrainState) -> None:
        self._job, self._state, self._meter = job, state, Meter()
        self._last: Launched | None = None
        self._last_end = 0.0
        self._stopped = torch.zeros(
            (), device=job.prepared.built.device
        )  # 1 from a step on that is not taken

    def stopped_by(self, numbers: Unread) -> Tensor:
        """1.0 if this step is not taken or one before it was not, else 0.0: on the device, the same on all ranks."""
        stopped = 1 - numbers.is_finite.float()
        self._job.ranks.add_on_device(stopped)
        self._stopped = torch.maximum(self._stopped, stopped.clamp(max=1))
        return self._stopped

    def follow(self, launched: Launched) -> None:
        """`launched` is the last step now."""
        self._last = launched

    def settle(self) -> bool:
        """Read and report the last step. False if it was not taken: then the state is that before it, with half the
        loss scale. Raises TrainingError where it can never be taken.
        """
        last, self._last = self._last, None
        if last is None:
            return True
        numbers = last.numbers
        if isinstance(numbers, Unread):
            passes = numbers.passes
            (mean, norm, rows), sums = numbers.read(last.batch, self._job.ranks)
            if not (math.isfinite(mean) and math.isfinite(norm)):
                if not last.scale.active or not math.isfinite(mean):
                    raise not_finite(self._job, last.step, last.batch, mean, norm)
                self._state.step, self._state.scale = last.step - 1, last.scale
                self._state.scale.overflowed(last.step)
                torch.set_rng_state(last.random)
                self._stopped = torch.zeros_like(self._stopped)
                return False
            if passes is not None:
                self._job.observe(passes.event(self._job, last.step, sums))
            numbers = mean, norm, rows
        self._report(last, *numbers)
        return True

    def _report(self, done: Launched, loss: float, norm: float, row_losses: NDArray[np.float64]) -> None:
        job, batch = self._job, done.batch
        if job.visits is not None:
            job.visits.add(done.step, job.rows.numbers_at(batch.indices), row_losses)
        now = time.perf_counter()
        seconds, self._last_end = now - max(done.started, self._last_end), now
        if not len(batch.indices):
            return
        self._state.last_loss = loss
        job.observe(
            Step(
                step=done.step,
                num_steps=done.num_steps,
                epoch=round(job.order.epoch_at(done.step - job.first_step), 4),
                loss=loss,
                learning_rate=done.rate,
                grad_norm=norm,
                supervised_tokens=batch.supervised,
                tokens=batch.tokens,
                rows=len(batch.indices),
                tokens_per_second=self._meter.update(batch.tokens, seconds),
                seconds=seconds,
                memory_bytes=device_memory_bytes(job.prepared.built.device) or Meter.memory_bytes(),
                ranks=job.ranks.world_size,
                imbalance=round(batch.imbalance, 4),
            )
        )


def not_finite(job: TrainContext, step: int, batch: Batch, mean: float, norm: float) -> TrainingError:
    """The error of a step with a loss or a gradient that is not finite."""
    what = "loss" if not math.isfinite(mean) else "gradient"
    return TrainingError(
        f"step {step}: the {what} is not finite (loss {mean}, gradient norm {norm}); no weight was changed",
        place=job.places(batch),
        hint="lower train.learning_rate, or look at these rows; the last checkpoint can be resumed",
    )


def by_rows(batch: Batch, losses: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Of each row of the step (4, rows): the sums of the losses and of the weights of its targets, and both of its last
    target. All are 0 for the rows of other ranks.
    """
    sums, at = np.zeros((4, len(batch.indices))), 0
    for pack in batch.packs:
        if not len(pack.rows):  # an empty pack has a loss that is of no row
            continue
        found = losses[at : at + len(pack.targets)]
        weights = np.ones(len(found)) if pack.weights is None else pack.weights
        ends = np.cumsum(pack.counts)[pack.counts > 0] - 1
        owners, last = np.repeat(pack.rows, pack.counts), pack.rows[pack.counts > 0]
        if pack.sides is not None:  # the loss of two answers stands at the first target of their row
            weights = np.isin(np.arange(len(found)), np.unique(owners, return_index=True)[1]).astype(float)
        for of_row, values in zip(sums, (found, weights, found[ends], weights[ends]), strict=True):
            np.add.at(of_row, owners if len(values) == len(owners) else last, values)
        at += len(found)
    return sums


def of_rows(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """(2, rows): the mean loss of the targets of each row, and the loss of the last one; NaN for a row without one."""
    losses = np.full((2, sums.shape[1]), np.nan)
    np.divide(sums[::2], sums[1::2], out=losses, where=sums[1::2] > 0)
    return losses
