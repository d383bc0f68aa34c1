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

from lorafit.data.batch import Batch, RankShare, Rows
from lorafit.data.packing import EMPTY_PACK, Pack
from lorafit.data.row_order import RowOrder
from lorafit.distributed.parallel import Engine
from lorafit.distributed.ranks import RankError, Ranks
from lorafit.distributed.watchdog import BETWEEN, COMPUTING, SHARING, Heartbeat
from lorafit.errors import RunError, TrainingError
from lorafit.evaluate.heldout import heldout_loss
from lorafit.forward import pack_loss
from lorafit.model.device import device_memory_bytes
from lorafit.model.llama import Llama
from lorafit.model.lora import disable_adapter
from lorafit.model.memory import MUCH_FREE, is_out_of_memory, release_free_memory
from lorafit.observe.events import Heldout, Message, Observer, Progress, Step
from lorafit.observe.meters import Meter
from lorafit.run_dir import RunDirectory
from lorafit.training.checkpoint import AdapterFacts, TrainState, adapter_digest, snapshot
from lorafit.training.checkpoint_writer import AsyncCheckpointWriter
from lorafit.training.optim import AdamW, clip, learning_rate


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
class TrainContext:
    """A run put together: what the loop works on. Built by training/run.py."""

    settings: Settings
    ranks: Ranks  # the processes that train together: one, or those that torchrun started
    share: RankShare
    engine: Engine
    heartbeat: Heartbeat
    network: Llama
    adapter_parameters: Sequence[torch.nn.Parameter]
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
    job: TrainContext,
    state: TrainState,
    stop: Callable[[], bool],
    save_now: Callable[[], bool] = lambda: False,
) -> Literal["finished", "ended early", "interrupted"]:
    """Train from `state` to the end, or until `stop()` asks to end after the current step; both are saved. Held-out
    measurements without a better one end it early where the settings say so.

    `save_now()` asks for a checkpoint after the current step. Raises TrainingError, before any weight changes, when
    a step's loss or gradient is not finite or it has no supervised tokens; RunError when a checkpoint cannot be
    written or memory runs out (then the state before that step is saved).
    """
    job.network.train()
    with job.heartbeat, AsyncCheckpointWriter(job.run, job.settings.keep, job.facts, job.observe) as writer:
        if state.measuring_due and (_measure(job, writer, state) or _early_stopped(job, state)):
            _save(job, writer, state, "ended early" if _early_stopped(job, state) else "best")
        with ThreadPoolExecutor(1, "packs") as ahead:
            reason = _steps(job, state, writer, ahead, stop, save_now)
        writer.wait(block=True)
        return reason


def _steps(
    job: TrainContext,
    state: TrainState,
    writer: AsyncCheckpointWriter,
    ahead: ThreadPoolExecutor,
    stop: Callable[[], bool],
    save_now: Callable[[], bool],
) -> Literal["finished", "ended early", "interrupted"]:
    """The steps; the rows of the next one are laid out by `ahead` while the device works."""
    settings = job.settings
    meter = Meter()
    device = job.network.lm_head.weight.device
    upcoming = ahead.submit(_batch, job, state, state.step)
    while state.step < settings.num_steps and not _early_stopped(job, state):
        started = time.perf_counter()
        job.heartbeat.at(state.step + 1, COMPUTING)
        batch = upcoming.result()
        upcoming = ahead.submit(_batch, job, state, state.step + 1)

        gradients = _gradients(job, state, batch)
        if gradients is None:
            _reduce_micro_batch(job, writer, state, batch)
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
        release_free_memory(MUCH_FREE)

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
        writer.wait(block=False)
        ended = state.step == settings.num_steps
        due = ended or _due(state.step, settings.eval_every, job.order)
        state.measuring_due = due and bool(job.heldout)
        stopping = state.measuring_due and job.ranks.any(stop())[0]
        better = state.measuring_due and not stopping and _measure(job, writer, state)
        stopping, asked = job.ranks.any(stop(), save_now())  # a signal to one rank is one to all
        early = _early_stopped(job, state) and not ended
        speaks = settings.samples_every is not None and job.ranks.is_main and not (stopping or ended or early)
        if speaks and _due(state.step, settings.samples_every or 0, job.order):
            job.speak(state.step)
        if stopping or ended or early or better or asked or _due(state.step, settings.save_every, job.order):
            reason = "stopped" if stopping else "best" if better else "finished" if ended else "due"
            reason = "ended early" if early else reason
            _save(job, writer, state, "asked for" if asked and reason == "due" else reason)
        if stopping and (not ended or state.measuring_due):
            return "interrupted"
    return "finished" if state.step == settings.num_steps else "ended early"


def _batch(job: TrainContext, state: TrainState, step: int) -> Batch:
    """The rows of a step and how they are laid out: a function of the step, so it can be made ahead."""
    capacity = state.micro_batch_tokens or job.settings.micro_batch_tokens
    return job.share.of(job.rows, job.order.rows(step), capacity, job.settings.packing)


def _gradients(job: TrainContext, state: TrainState, batch: Batch) -> tuple[float, float] | None:
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
        total, any_short = job.ranks.all_reduce_sum([total, float(short)])
        if any_short:
            job.optimizer.zero_grad()
            torch.set_rng_state(random)
            return None
        mean = total / batch.supervised
        if state.scale.active:
            torch._foreach_mul_(
                [m.grad for m in job.adapter_parameters if m.grad is not None], 1 / state.scale.factor
            )
        norm = float(clip(job.adapter_parameters, job.settings.max_grad_norm))
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


def _passes(job: TrainContext, state: TrainState, batch: Batch) -> tuple[float, bool]:
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
                release_free_memory(MUCH_FREE)
                if sharing := at == last:
                    job.heartbeat.at(state.step + 1, SHARING)
                (loss * (state.scale.factor / batch.supervised)).backward()
                losses.append(loss.detach())
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if not job.ranks.is_single_process:
            if sharing or job.engine.lockstep:
                raise RunError(
                    f"rank {job.ranks.rank} is out of memory in step {state.step + 1}",
                    place=str(job.run.path),
                    hint=f"set train.micro_batch_tokens below {packs[last].num_tokens}: memory, never mathematics",
                ) from None
            job.engine.loss(pack_loss, EMPTY_PACK).backward()
        return 0.0, True
    return sum(map(float, losses)), False  # read only here: a device is waited for once


def _measure(job: TrainContext, writer: AsyncCheckpointWriter, state: TrainState) -> bool:
    """Held-out loss now, and once of the base; True when the adapter is the best so far.

    Raises RunError when memory runs out; then the step is saved, and a resume makes up the measurement.
    """

    def measuring(done: int, total: int) -> None:
        job.observe(Progress("measuring held-out rows", done, total))
        job.heartbeat.at(state.step, BETWEEN)

    try:
        if state.base_loss is None:
            with disable_adapter(job.network):
                state.base_loss = heldout_loss(job.network, job.heldout, measuring, job.ranks, job.engine)
        loss = heldout_loss(job.network, job.heldout, measuring, job.ranks, job.engine)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or not job.ranks.is_single_process:  # others cannot know, and wait
            raise
        _out_of_memory(job, writer, state, "measuring held-out rows", job.heldout)
    state.measuring_due = False
    better = state.best_loss is None or loss < state.best_loss
    state.num_worse = 0 if better else state.num_worse + 1
    if better:
        state.best_loss, state.best_step = loss, state.step
    job.observe(Heldout(state.step, loss, state.base_loss, better))
    return better


def _early_stopped(job: TrainContext, state: TrainState) -> bool:
    """Whether the held-out loss has not fallen for as many measurements as the settings wait."""
    return 0 < job.settings.patience <= state.num_worse


def _reduce_micro_batch(
    job: TrainContext, writer: AsyncCheckpointWriter, state: TrainState, batch: Batch
) -> None:
    """Memory ran out: halve the passes where that was asked for and helps, else save and raise RunError."""
    sizes = [(pack.num_tokens, len(pack.lengths)) for pack in batch.packs]
    most = [max(numbers) for numbers in zip(*sizes, strict=True)] or [0, 0]
    largest, documents = map(int, job.ranks.all_reduce_max(most))
    if job.settings.halve and documents > 1:
        now = state.micro_batch_tokens or job.settings.micro_batch_tokens
        state.micro_batch_tokens = min(now, largest) // 2
        job.observe(
            Message(
                f"out of memory in step {state.step + 1}: repeated with passes of at most "
                f"{state.micro_batch_tokens} tokens, the mathematics is the same",
                "warning",
            )
        )
        return
    _out_of_memory(job, writer, state, f"in step {state.step + 1}", batch.packs)


def _out_of_memory(
    job: TrainContext, writer: AsyncCheckpointWriter, state: TrainState, where: str, packs: Sequence[Pack]
) -> NoReturn:
    """Save the state and raise RunError with what would make passes like `packs` smaller."""
    saved = ""
    if state.step:
        if job.ranks.any(job.ranks.is_main and state.step not in job.run.saved_steps())[0]:
            _save(job, writer, state, "out of memory")
        writer.wait(block=True)
        saved = f"; step {state.step} is saved and verified"
    hint = "one row fills the pass: train.recompute=layers takes a fraction of the memory"
    if any(len(pack.lengths) > 1 for pack in packs):
        smaller = f"train.micro_batch_tokens={max(8, max(pack.num_tokens for pack in packs) // 2)}"
        hint = f"go on with `lorafit train --resume {job.run.path} {smaller}`: memory, never mathematics"
    raise RunError(f"out of memory {where}{saved}", place=str(job.run.path), hint=hint)


def _save(job: TrainContext, writer: AsyncCheckpointWriter, state: TrainState, reason: str) -> None:
    """Copy the state and have it committed, by the first rank, while training goes on."""
    if not job.ranks.is_single_process and not job.ranks.all_equal(adapter_digest(job.network)):
        raise RankError(
            f"the ranks hold different adapters after step {state.step}; nothing was saved",
            place=str(job.run.path),
            hint="one of the machines computes wrong; the last checkpoint can be resumed",
        )
    if not job.ranks.is_main:
        return
    writer.save(snapshot(job.network, job.optimizer, state, job.adapter), reason)


def _due(step: int, every: int, order: RowOrder) -> bool:
    """Whether something that happens every so many steps (0 is every epoch) happens after `step`."""
    return step % (every or order.steps_per_epoch) == 0
