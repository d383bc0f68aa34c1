"""The train loop: every act that changes weights, measures or saves is a visible line in it, in order."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorafit.data.loader import RowOrder
from lorafit.data.packing import BLANK, Pack
from lorafit.errors import RunError, TrainingError
from lorafit.evaluate.heldout import heldout_loss, pack_loss
from lorafit.model.device import device_memory_bytes
from lorafit.model.llama import Llama
from lorafit.model.lora import set_enabled
from lorafit.model.memory import MUCH_FREE, give_back_memory, is_out_of_memory
from lorafit.observe.events import Busy, Heldout, Note, Observer, Step
from lorafit.observe.meters import Meter
from lorafit.rundir import RunDirectory
from lorafit.training.batch import Batch, Rows, Share
from lorafit.training.checkpoint import AdapterFacts, TrainState, adapter_digest, snapshot
from lorafit.training.engine import Engine
from lorafit.training.heartbeat import BETWEEN, COMPUTING, SHARING, Heartbeat
from lorafit.training.optim import AdamW, clip, learning_rate
from lorafit.training.ranks import RankError, Ranks
from lorafit.training.saving import Saver


@dataclass(frozen=True, slots=True)
class Settings:
    """The plain values of a run."""

    num_steps: int
    learning_rate: float
    schedule: Literal["cosine", "linear", "constant"]
    warmup: int
    max_grad_norm: float
    micro_batch_tokens: int
    halve: bool  # the micro-batch, where memory runs out
    packing: bool
    eval_every: int
    save_every: int
    samples_every: int | None
    keep: int
    patience: int  # measurements in a row without a better one that end the run; 0 for never


@dataclass(frozen=True, slots=True)
class Job:
    """A run put together: what the loop works on. Built by training/run.py."""

    settings: Settings
    ranks: Ranks  # the processes that train together: one, or those that torchrun started
    share: Share
    engine: Engine
    heartbeat: Heartbeat
    network: Llama
    masters: Sequence[torch.nn.Parameter]
    optimizer: AdamW
    rows: Rows
    order: RowOrder
    places: Callable[[NDArray[np.int64]], str]  # names rows for error messages
    heldout: Sequence[Pack]
    run: RunDirectory
    adapter: AdapterFacts
    facts: Mapping[str, Any]
    observe: Observer
    speak: Callable[[int], None]  # answers the fixed held-out prompts; changes nothing


def train(
    job: Job, state: TrainState, stop: Callable[[], bool], save_now: Callable[[], bool] = lambda: False
) -> Literal["finished", "ended early", "interrupted"]:
    """Train from `state` to the end, or until `stop()` asks to end after the current step; both are saved. Held-out
    measurements without a better one end it early where the settings say so.

    `save_now()` asks for a checkpoint after the current step. Raises TrainingError, before any weight changes, when
    a step's loss or gradient is not finite or it has no supervised tokens; RunError when a checkpoint cannot be
    written or memory runs out (then the state before that step is saved).
    """
    job.network.train()
    with job.heartbeat, Saver(job.run, job.settings.keep, job.facts, job.observe) as saver:
        if state.measuring_due and (_measure(job, saver, state) or _gave_up(job, state)):
            _save(job, saver, state, "ended early" if _gave_up(job, state) else "best")
        with ThreadPoolExecutor(1, "packs") as ahead:
            reason = _steps(job, state, saver, ahead, stop, save_now)
        saver.settle(wait=True)
        return reason


def _steps(
    job: Job,
    state: TrainState,
    saver: Saver,
    ahead: ThreadPoolExecutor,
    stop: Callable[[], bool],
    save_now: Callable[[], bool],
) -> Literal["finished", "ended early", "interrupted"]:
    """The steps; the rows of the next one are laid out by `ahead` while the device works."""
    settings = job.settings
    meter = Meter()
    device = job.network.lm_head.weight.device
    upcoming = ahead.submit(_batch, job, state, state.step)
    while state.step < settings.num_steps and not _gave_up(job, state):
        started = time.perf_counter()
        job.heartbeat.at(state.step + 1, COMPUTING)
        batch = upcoming.result()
        upcoming = ahead.submit(_batch, job, state, state.step + 1)

        gradients = _gradients(job, state, batch)
        if gradients is None:
            _shrink(job, saver, state, batch)
            upcoming = ahead.submit(_batch, job, state, state.step)
            continue
        loss, norm = gradients
        rate = learning_rate(
            state.step, settings.num_steps, settings.learning_rate, settings.schedule, settings.warmup
        )
        job.optimizer.step(rate)
        job.optimizer.zero_grad()
        state.step += 1
        job.heartbeat.at(state.step, BETWEEN)
        state.last_loss = loss
        state.scale.went_well()
        give_back_memory(MUCH_FREE)

        seconds = time.perf_counter() - started
        job.observe(
            Step(
                step=state.step,
                num_steps=settings.num_steps,
                epoch=round(job.order.epoch_at(state.step), 4),
                loss=loss,
                learning_rate=rate,
                grad_norm=norm,
                supervised_tokens=batch.supervised,
                tokens=batch.tokens,
                rows=len(batch.indices),
                tokens_per_second=meter.update(batch.tokens, seconds),
                seconds=seconds,
                memory_bytes=device_memory_bytes(device) or Meter.memory_bytes(),
                ranks=job.ranks.world_size,
                imbalance=round(batch.imbalance, 4),
            )
        )
        saver.settle(wait=False)
        ended = state.step == settings.num_steps
        due = ended or _due(state.step, settings.eval_every, job.order)
        state.measuring_due = due and bool(job.heldout)
        stopping = state.measuring_due and job.ranks.any(stop())[0]
        better = state.measuring_due and not stopping and _measure(job, saver, state)
        stopping, asked = job.ranks.any(stop(), save_now())  # a signal to one rank is one to all
        early = _gave_up(job, state) and not ended
        speaks = settings.samples_every is not None and job.ranks.first and not (stopping or ended or early)
        if speaks and _due(state.step, settings.samples_every or 0, job.order):
            job.speak(state.step)
        if stopping or ended or early or better or asked or _due(state.step, settings.save_every, job.order):
            reason = "stopped" if stopping else "best" if better else "finished" if ended else "due"
            reason = "ended early" if early else reason
            _save(job, saver, state, "asked for" if asked and reason == "due" else reason)
        if stopping and (not ended or state.measuring_due):
            return "interrupted"
    return "finished" if state.step == settings.num_steps else "ended early"


def _batch(job: Job, state: TrainState, step: int) -> Batch:
    """The rows of a step and how they are laid out: a function of the step, so it can be made ahead."""
    capacity = state.micro_batch_tokens or job.settings.micro_batch_tokens
    return job.share.of(job.rows, job.order.rows(step), capacity, job.settings.packing)


def _gradients(job: Job, state: TrainState, batch: Batch) -> tuple[float, float] | None:
    """Accumulate the step's gradient, clipped; returns (mean loss, norm before clipping), both finite.

    The sum of losses over all packs of all ranks is divided once by the step's supervised tokens, so the gradient
    does not depend on how the rows were laid out. A float16 overflow is repeated with the same rows and random
    numbers. None says that memory ran out, on any rank; then everything is as before the step.
    """
    step = state.step + 1
    if batch.supervised == 0:
        raise TrainingError(f"step {step} has no supervised tokens", place=job.places(batch.indices))
    random = torch.get_rng_state()
    while True:
        total, short = _passes(job, state, batch)
        total, any_short = job.ranks.sum([total, float(short)])
        if any_short:
            job.optimizer.zero_grad()
            torch.set_rng_state(random)
            return None
        mean = total / batch.supervised
        if state.scale.active:
            torch._foreach_mul_([m.grad for m in job.masters if m.grad is not None], 1 / state.scale.factor)
        norm = float(clip(job.masters, job.settings.max_grad_norm))
        if math.isfinite(mean) and math.isfinite(norm):
            return mean, norm
        job.optimizer.zero_grad()
        if not state.scale.active or not math.isfinite(mean):
            what = "loss" if not math.isfinite(mean) else "gradient"
            raise TrainingError(
                f"step {step}: the {what} is not finite (loss {mean}, gradient norm {norm}); no weight was changed",
                place=job.places(batch.indices),
                hint="lower train.learning_rate, or look at these rows; the last checkpoint can be resumed",
            )
        state.scale.overflowed(step)
        torch.set_rng_state(random)


def _passes(job: Job, state: TrainState, batch: Batch) -> tuple[float, bool]:
    """This rank's passes: (sum of their losses, whether memory ran out). The last one adds up the ranks' gradients.

    All passes, of all ranks, take the same random numbers: what dropout takes from a row is a function of the step
    and the row's place in it.
    """
    random = torch.get_rng_state()
    packs, last = batch.packs, len(batch.packs) - 1
    losses: list[Tensor] = []
    sharing = False  # from then on a rank that gives up leaves the others waiting
    try:
        for at, pack in enumerate(packs):
            torch.set_rng_state(random)
            with nullcontext() if at == last else job.engine.accumulating():
                loss = job.engine.loss(pack_loss, pack)
                give_back_memory(MUCH_FREE)
                if sharing := at == last:
                    job.heartbeat.at(state.step + 1, SHARING)
                (loss * (state.scale.factor / batch.supervised)).backward()
                losses.append(loss.detach())
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if not job.ranks.alone:
            if sharing or job.engine.lockstep:
                raise RunError(
                    f"rank {job.ranks.rank} is out of memory in step {state.step + 1}",
                    place=str(job.run.path),
                    hint=f"set train.micro_batch_tokens below {packs[last].num_tokens}: memory, never mathematics",
                ) from None
            job.engine.loss(pack_loss, BLANK).backward()
        return 0.0, True
    return sum(map(float, losses)), False  # read only here: a device is waited for once


def _measure(job: Job, saver: Saver, state: TrainState) -> bool:
    """Held-out loss now, and once of the base; True when the adapter is the best so far.

    Raises RunError when memory runs out; then the step is saved, and a resume makes up the measurement.
    """

    def measuring(done: int, total: int) -> None:
        job.observe(Busy("measuring held-out rows", done, total))
        job.heartbeat.at(state.step, BETWEEN)

    try:
        if state.base_loss is None:
            set_enabled(job.network, False)
            state.base_loss = heldout_loss(job.network, job.heldout, measuring, job.ranks, job.engine)
            set_enabled(job.network, True)
        loss = heldout_loss(job.network, job.heldout, measuring, job.ranks, job.engine)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or not job.ranks.alone:  # others cannot know, and wait
            raise
        _out_of_memory(job, saver, state, "measuring held-out rows", job.heldout)
    state.measuring_due = False
    better = state.best_loss is None or loss < state.best_loss
    state.num_worse = 0 if better else state.num_worse + 1
    if better:
        state.best_loss, state.best_step = loss, state.step
    job.observe(Heldout(state.step, loss, state.base_loss, better))
    return better


def _gave_up(job: Job, state: TrainState) -> bool:
    """Whether the held-out loss has not fallen for as many measurements as the settings wait."""
    return 0 < job.settings.patience <= state.num_worse


def _shrink(job: Job, saver: Saver, state: TrainState, batch: Batch) -> None:
    """Memory ran out: halve the passes where that was asked for and helps, else save and raise RunError."""
    sizes = [(pack.num_tokens, len(pack.lengths)) for pack in batch.packs]
    most = [max(numbers) for numbers in zip(*sizes, strict=True)] or [0, 0]
    largest, documents = map(int, job.ranks.most(most))
    if job.settings.halve and documents > 1:
        now = state.micro_batch_tokens or job.settings.micro_batch_tokens
        state.micro_batch_tokens = min(now, largest) // 2
        job.observe(
            Note(
                f"out of memory in step {state.step + 1}: repeated with passes of at most "
                f"{state.micro_batch_tokens} tokens, the mathematics is the same",
                "warning",
            )
        )
        return
    _out_of_memory(job, saver, state, f"in step {state.step + 1}", batch.packs)


def _out_of_memory(job: Job, saver: Saver, state: TrainState, where: str, packs: Sequence[Pack]) -> NoReturn:
    """Save the state and raise RunError with what would make passes like `packs` smaller."""
    saved = ""
    if state.step:
        if job.ranks.any(job.ranks.first and state.step not in job.run.saved_steps())[0]:
            _save(job, saver, state, "out of memory")
        saver.settle(wait=True)
        saved = f"; step {state.step} is saved and verified"
    hint = "one row fills the pass: train.recompute=layers takes a fraction of the memory"
    if any(len(pack.lengths) > 1 for pack in packs):
        smaller = f"train.micro_batch_tokens={max(8, max(pack.num_tokens for pack in packs) // 2)}"
        hint = f"go on with `lorafit train --resume {job.run.path} {smaller}`: memory, never mathematics"
    raise RunError(f"out of memory {where}{saved}", place=str(job.run.path), hint=hint)


def _save(job: Job, saver: Saver, state: TrainState, reason: str) -> None:
    """Copy the state and have it committed, by the first rank, while training goes on."""
    if not job.ranks.alone and not job.ranks.same(adapter_digest(job.network)):
        raise RankError(
            f"the ranks hold different adapters after step {state.step}; nothing was saved",
            place=str(job.run.path),
            hint="one of the machines computes wrong; the last checkpoint can be resumed",
        )
    if not job.ranks.first:
        return
    saver.save(snapshot(job.network, job.optimizer, state, job.adapter), reason)


def _due(step: int, every: int, order: RowOrder) -> bool:
    """Whether something that happens every so many steps (0 is every epoch) happens after `step`."""
    return step % (every or order.steps_per_epoch) == 0
