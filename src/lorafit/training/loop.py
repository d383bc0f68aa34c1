"""The train loop: each act that changes weights, measures or saves is one line in it, in order."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from lorafit.config.schema import Config
from lorafit.data.batch import Batch, RankShare
from lorafit.data.build import TrainingData
from lorafit.data.packing import EMPTY_PACK, Pack, Packer
from lorafit.data.row_order import RowOrder
from lorafit.data.token_dataset import TokenDataset
from lorafit.distributed.parallel import Compute, Engine
from lorafit.distributed.ranks import RankError, Ranks
from lorafit.distributed.watchdog import BETWEEN, COMPUTING, SHARING, Heartbeat
from lorafit.errors import RunError, TrainingError
from lorafit.evaluate.drift import Neutral
from lorafit.evaluate.heldout import heldout_loss
from lorafit.evaluate.samples import SampleGenerator
from lorafit.forward import divergences, pack_losses
from lorafit.model.adamw import AdamW
from lorafit.model.llama import Llama
from lorafit.model.lora import disable_adapter
from lorafit.model.memory import MUCH_FREE, is_out_of_memory, release_free_memory
from lorafit.observe.events import Digest, Drift, Heldout, Message, Observer, Progress
from lorafit.observe.visits import VisitLog
from lorafit.plan.cadence import Cadence
from lorafit.redact import shell
from lorafit.run_dir import RunDirectory
from lorafit.training import pace
from lorafit.training.checkpoint import TrainState, adapter_digest, snapshot
from lorafit.training.checkpoint_writer import AsyncCheckpointWriter
from lorafit.training.objective import OBJECTIVES, Objective, Passes, measure
from lorafit.training.reference import Reference
from lorafit.training.setup import Prepared
from lorafit.training.signals import Requests
from lorafit.training.step_numbers import Launched, Numbers, Trail, Unread, by_rows, not_finite, of_rows
from lorafit.training.stream_cache import StreamCache

Outcome = Literal["finished", "ended early", "interrupted"]
SAME_RESULT = "this needs less memory and does not change the result"
_NO_ROWS: Numbers = (0.0, 0.0, np.empty((2, 0)))


@dataclass(frozen=True, slots=True)
class TrainContext:
    """What the loop works on. Built by training/run.py.

    `rows` are those that are trained. `first_step` is the number of steps before those of `cadence`, `initial` the
    adapter before the first step, where a second phase needs it (training/refit.py), `reference` the starting point
    of a method that compares answers.
    """

    prepared: Prepared
    run: RunDirectory
    ranks: Ranks
    observe: Observer
    network: Llama
    engine: Engine
    optimizer: AdamW
    rows: TokenDataset
    order: RowOrder
    share: RankShare
    packer: Packer
    heldout: Sequence[Pack]
    cadence: Cadence
    heartbeat: Heartbeat
    samples: SampleGenerator
    kept: StreamCache | None
    kept_heldout: StreamCache | None
    facts: Mapping[str, Any]
    initial: Mapping[str, Tensor]
    visits: VisitLog | None  # of the first rank
    neutral: Neutral | None = None
    first_step: int = 0
    reference: Reference | None = None
    is_late: bool = False  # whether the numbers of a step are read one step later

    @property
    def objective(self) -> Objective:
        """The method of the run."""
        return OBJECTIVES[self.config.train.method]

    @property
    def num_steps(self) -> int:
        """The number of the last step."""
        return self.first_step + self.cadence.num_steps

    @property
    def config(self) -> Config:
        """The final config of the run."""
        return self.prepared.config

    @property
    def data(self) -> TrainingData:
        """The rows of the run."""
        return self.prepared.data.training_data

    def places(self, batch: Batch) -> str:
        """The places of the rows of a step, for error messages."""
        return ", ".join(self.data.index.place(self.rows.number(index)) for index in batch.indices)


def train(job: TrainContext, state: TrainState, requests: Requests) -> Outcome:
    """Train from `state` to the end, or until `requests` has a stop: then to the end of the current step. Both states
    are saved. Held-out measurements without a better one end the run early where the config says so.

    Raises TrainingError, before any weight changes, where a step's loss or gradient is not finite or it has no
    supervised tokens; RunError where a checkpoint cannot be written or memory runs out (then the state before that
    step is saved).
    """
    job.network.train()
    timing = pace.Pace(job.config.train, job.num_steps, job.first_step)
    if state.budget is not None:
        timing = pace.TimedPace(job.config.train, state.budget, state.step, job.ranks)
    with (
        job.heartbeat,
        AsyncCheckpointWriter(job.run, job.config.train.keep, job.facts, job.observe) as writer,
    ):
        if state.budget is not None and state.base_loss is None and job.heldout:
            _measure_base(job, state)  # what a measurement takes must be known before the end
        if state.measuring_due:
            better, early = _measure(job, writer, state), state.early_stopped(job.config.train.patience)
            if better or early:
                _save(job, writer, state, "ended early" if early else "best")
        with ThreadPoolExecutor(1, "packs") as ahead:
            outcome = _steps(job, state, writer, ahead, requests, timing)
        writer.wait(block=True)
        return outcome


def _steps(
    job: TrainContext,
    state: TrainState,
    writer: AsyncCheckpointWriter,
    ahead: ThreadPoolExecutor,
    requests: Requests,
    timing: pace.Pace,
) -> Outcome:
    """The steps. The thread `ahead` packs the rows of the next one while the device works."""
    settings, is_first = job.config.train, True  # since the last save
    job = replace(job, is_late=_may_be_late(job))
    trail = Trail(job, state)
    upcoming = ahead.submit(_batch, job, state, state.step)
    while state.step < timing.num_steps and not state.early_stopped(settings.patience):
        started = time.perf_counter()
        rate = timing.rate(state.step)
        job.heartbeat.at(state.step + 1, COMPUTING)
        batch = upcoming.result()
        upcoming = ahead.submit(_batch, job, state, state.step + 1)

        updates = len(batch.indices) > 0  # not where all its rows are left out
        before = torch.get_rng_state(), replace(state.scale)
        numbers = _gradients(job, state, batch) if updates else _NO_ROWS
        if isinstance(numbers, Unread):
            job.optimizer.step(rate, trail.stopped_by(numbers))
        elif numbers is not None and updates:
            job.optimizer.step(rate)
        job.optimizer.zero_grad()
        if not trail.settle():  # the step before was not taken, so neither was this one
            upcoming = ahead.submit(_batch, job, state, state.step)
            continue
        if numbers is None:
            _reduce_micro_batch(job, writer, state, batch)
            upcoming = ahead.submit(_batch, job, state, state.step)
            continue
        state.step += 1
        due = timing.count(state.step, job.cadence.at(state.step - job.first_step), writer.seconds)
        job.heartbeat.at(state.step, BETWEEN)
        state.scale.went_well()
        release_free_memory(MUCH_FREE)
        trail.follow(Launched(state.step, batch, rate, timing.num_steps, started, numbers, *before))
        ended = state.step == timing.num_steps
        writer.wait(block=False)
        if isinstance(numbers, Unread) and not (
            is_first or ended or any(due) or job.ranks.any(requests.any())[0]
        ):
            continue
        if not trail.settle():
            upcoming = ahead.submit(_batch, job, state, state.step)
            continue
        if is_first and job.ranks.is_main:
            job.observe(Digest(state.step, adapter_digest(job.network).hex()))
        is_first = False
        state.too_far = due.measure and _is_too_far(job, state)
        state.measuring_due = due.measure and bool(job.heldout) and not state.too_far
        stopping = state.measuring_due and job.ranks.any(requests.stop())[0]
        better = state.measuring_due and not stopping and _measure(job, writer, state)
        # a signal to one rank is one to all
        stopping, requested = job.ranks.any(requests.stop(), requests.save())
        early = state.early_stopped(settings.patience) and not ended
        if due.sample and job.ranks.is_main and not (stopping or early or job.engine.lockstep):
            job.samples(state.step)
        if stopping or early or better or requested or due.save:
            reason = "stopped" if stopping else "best" if better else "finished" if ended else "due"
            reason = "ended early" if early else reason
            timing.pause()
            _save(job, writer, state, "asked for" if requested and reason == "due" else reason)
            is_first = True
        if stopping and (not ended or state.measuring_due):
            return "interrupted"
    return "finished" if state.step == timing.num_steps else "ended early"


def _may_be_late(job: TrainContext) -> bool:
    """Whether a step can end on the device alone."""
    return job.prepared.built.device.type == "cuda"


def _batch(job: TrainContext, state: TrainState, step: int) -> Batch:
    """The packed rows of a step: a function of the step, so another thread can prepare the next one."""
    packer = replace(job.packer, capacity=state.micro_batch_tokens or job.packer.capacity)
    step -= job.first_step
    return job.share.of(job.rows.to_pack, job.order.rows(step), packer)


def _gradients(job: TrainContext, state: TrainState, batch: Batch) -> Numbers | Unread | None:
    """Accumulate the step's gradient, clipped; returns (mean loss, norm before clipping, losses of each row), or
    what the device will know of these.

    The sum of losses over all packs of all ranks is divided once by the weight of the step's supervised tokens (their
    number, where the rows have no weights), so the gradient does not depend on the packing. A float16 overflow is
    repeated with the same rows and random numbers. None means that memory ran out, on any rank; then everything is as
    before the step.
    """
    step = state.step + 1
    if batch.weight == 0:
        raise TrainingError(f"step {step} has no supervised tokens", place=job.places(batch))
    random = torch.get_rng_state()
    while True:
        compute: Compute = pack_losses
        if job.objective.loss is not None:
            compute = Passes(job, batch)
        elif job.kept is not None:
            compute = partial(pack_losses, below=job.kept.of(batch.indices))
        losses, of_targets, short = _passes(job, state, batch, compute)
        total, any_short, each, row_losses = 0.0, float(short), np.zeros((4, len(batch.indices))), [0.0]
        if job.is_late:
            any_short = job.ranks.any(short)[0]  # of the hosts: no device is waited for
        else:  # only here, so that the device is waited for once
            if not short:
                total, each = sum(map(float, losses)), by_rows(batch, torch.cat(of_targets).cpu().numpy())
            total, any_short, *row_losses = job.ranks.all_reduce_sum([total, any_short, *each.flat])
        if any_short:
            job.optimizer.zero_grad()
            torch.set_rng_state(random)
            return None
        if state.scale.active:
            gradients = [m.grad for m in job.optimizer.parameters if m.grad is not None]
            torch._foreach_mul_(gradients, 1 / state.scale.factor)
        length = clip_grad_norm_(job.optimizer.parameters, job.config.train.max_grad_norm or math.inf)
        if job.is_late:
            return Unread(losses, of_targets, length, compute if isinstance(compute, Passes) else None)
        mean = total / batch.weight
        norm = float(length)
        if math.isfinite(mean) and math.isfinite(norm):
            if isinstance(compute, Passes):
                job.observe(compute.event(job, step, compute.sums().tolist()))
            return mean, norm, of_rows(np.reshape(row_losses, each.shape))
        job.optimizer.zero_grad()
        if not state.scale.active or not math.isfinite(mean):
            raise not_finite(job, step, batch, mean, norm)
        state.scale.overflowed(step)
        torch.set_rng_state(random)


def _passes(
    job: TrainContext, state: TrainState, batch: Batch, compute: Compute
) -> tuple[list[Tensor], list[Tensor], bool]:
    """This rank's passes: (their losses, those of their targets, whether memory ran out). The last one all-reduces the
    gradients.

    All passes of all ranks start from the same random state. The dropout of a row is a function of the step and of
    the tokens of the row.
    """
    random = torch.get_rng_state()
    packs, last = batch.packs, len(batch.packs) - 1
    losses: list[Tensor] = []
    row_losses: list[Tensor] = []
    sharing = False  # from then on a rank that stops leaves the others waiting
    try:
        if job.config.train.anchor and job.neutral is not None:
            with job.engine.accumulating():
                anchor = job.neutral.anchor(state.step)
                weight = job.config.train.anchor * state.scale.factor / len(anchor.targets)
                (job.engine.loss(divergences, anchor)[0] * weight).backward()
        for index, pack in enumerate(packs):
            torch.set_rng_state(random)
            with nullcontext() if index == last else job.engine.accumulating():
                loss, each = job.engine.loss(compute, pack)
                release_free_memory(MUCH_FREE)
                if sharing := index == last:
                    job.heartbeat.at(state.step + 1, SHARING)
                (loss * (state.scale.factor / batch.weight)).backward()
                losses.append(loss.detach())
                row_losses.append(each.detach())
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if not job.ranks.is_single_process:
            if sharing or job.engine.lockstep:
                raise RunError(
                    f"rank {job.ranks.rank} is out of memory in step {state.step + 1}",
                    place=str(job.run.path),
                    hint=f"set train.micro_batch_tokens below {packs[last].num_tokens}: {SAME_RESULT}",
                ) from None
            job.engine.loss(pack_losses, EMPTY_PACK)[0].backward()
        return [], [], True
    return losses, row_losses, False


def _is_too_far(job: TrainContext, state: TrainState) -> bool:
    """Measure the drift from the base, where that is wanted; True where it is above `train.max_drift`."""
    limit = job.config.train.max_drift
    if limit is None and not job.config.run.drift:
        return False
    far = False
    if job.neutral is not None:  # on the first rank
        drift = Drift(state.step, *job.neutral.drift(job.network))
        job.observe(drift)
        far = limit is not None and drift.divergence > limit
    return job.ranks.any(far)[0]


def _measure_base(job: TrainContext, state: TrainState) -> None:
    """Measure the held-out loss of the base; of preferences it comes with every measurement."""
    with disable_adapter(job.network, when=job.objective.loss is None):
        state.base_loss = _heldout_loss(job, state)


def _heldout_loss(job: TrainContext, state: TrainState) -> float:
    """The held-out loss of the network as it is."""

    def measuring(done: int, total: int) -> None:
        job.observe(Progress("measuring held-out rows", done, total))
        job.heartbeat.at(state.step, BETWEEN)

    started = pace.clock()
    if job.objective.loss is not None:
        state.base_loss, loss = measure(job, state.step, measuring)
    else:
        kept = job.kept_heldout
        below = None if kept is None else kept.of(np.arange(len(job.data.heldout)))
        loss = heldout_loss(job.network, job.heldout, measuring, job.ranks, job.engine, below)
    if state.budget is not None:
        state.budget.measuring = pace.clock() - started
    return loss


def _measure(job: TrainContext, writer: AsyncCheckpointWriter, state: TrainState) -> bool:
    """Measure the held-out loss, and once that of the base; True where the adapter is the best so far.

    Raises RunError where memory runs out; then the step is saved, and a resume measures it.
    """
    try:
        if state.base_loss is None and job.objective.loss is None:
            _measure_base(job, state)
        loss = _heldout_loss(job, state)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or not job.ranks.is_single_process:  # the other ranks would wait
            raise
        _out_of_memory(job, writer, state, "measuring held-out rows", job.heldout)
    state.measuring_due = False
    better = state.measured(loss, job.config.train.tolerance)
    job.observe(Heldout(state.step, loss, state.base_loss, better))
    return better


def _reduce_micro_batch(
    job: TrainContext, writer: AsyncCheckpointWriter, state: TrainState, batch: Batch
) -> None:
    """Memory ran out: halve the passes where the settings say so and it helps, else save and raise RunError."""
    sizes = [(pack.num_tokens, len(pack.lengths)) for pack in batch.packs]
    most = [max(numbers) for numbers in zip(*sizes, strict=True)] or [0, 0]
    largest, documents = map(int, job.ranks.all_reduce_max(most))
    if job.config.run.too_large == "auto" and documents > 1:
        now = state.micro_batch_tokens or job.packer.capacity
        state.micro_batch_tokens = min(now, largest) // 2
        job.observe(
            Message(
                f"out of memory in step {state.step + 1}: repeated with passes of at most "
                f"{state.micro_batch_tokens} tokens; the result does not change",
                "warning",
            )
        )
        return
    _out_of_memory(job, writer, state, f"in step {state.step + 1}", batch.packs)


def _out_of_memory(
    job: TrainContext, writer: AsyncCheckpointWriter, state: TrainState, where: str, packs: Sequence[Pack]
) -> NoReturn:
    """Save the state and raise RunError with the setting that makes passes like `packs` smaller."""
    saved = ""
    if state.step:
        if job.ranks.any(job.ranks.is_main and state.step not in job.run.saved_steps())[0]:
            _save(job, writer, state, "out of memory")
        writer.wait(block=True)
        saved = f"; step {state.step} is saved and verified"
    hint = "one row fills the pass: train.recompute=layers needs a fraction of the memory"
    if any(len(pack.lengths) > 1 for pack in packs):
        smaller = f"train.micro_batch_tokens={max(8, max(pack.num_tokens for pack in packs) // 2)}"
        command = shell("lorafit", "train", "--resume", job.run.path, smaller)
        hint = f"continue with `{command}`: {SAME_RESULT}"
    raise RunError(f"out of memory {where}{saved}", place=str(job.run.path), hint=hint)


def _save(job: TrainContext, writer: AsyncCheckpointWriter, state: TrainState, reason: str) -> None:
    """Copy the state. The first rank commits it while training continues."""
    if not job.ranks.is_single_process and not job.ranks.all_equal(adapter_digest(job.network)):
        raise RankError(
            f"the ranks hold different adapters after step {state.step}; nothing was saved",
            place=str(job.run.path),
            hint="one of the machines makes errors; the last checkpoint can be resumed",
        )
    if job.ranks.is_main:
        writer.save(state, snapshot(job.prepared, job.optimizer, state), reason)
