"""The train loop: every act that changes weights, measures or saves is a visible line in it, in order."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from lorafit.data.loader import RowOrder
from lorafit.data.packing import Pack, TokenRow, make_packs
from lorafit.errors import RunError, TrainingError
from lorafit.evaluate.heldout import heldout_loss, pack_loss
from lorafit.model.device import device_memory_bytes
from lorafit.model.llama import Llama
from lorafit.model.lora import set_enabled
from lorafit.model.memory import MUCH_FREE, give_back_memory, is_out_of_memory
from lorafit.observe.events import Busy, Heldout, Note, Observer, Step
from lorafit.observe.meters import Meter
from lorafit.rundir import RunDirectory
from lorafit.training.checkpoint import AdapterFacts, TrainState, snapshot
from lorafit.training.optim import clip, learning_rate
from lorafit.training.saving import Saver


class Rows(Protocol):
    """Tokenised rows by index."""

    def row(self, index: int) -> TokenRow: ...


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
    keep: int


@dataclass(frozen=True, slots=True)
class Job:
    """A run put together: what the loop works on. Built by training/run.py."""

    settings: Settings
    network: Llama
    masters: Sequence[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    rows: Rows
    order: RowOrder
    places: Callable[[NDArray[np.int64]], str]  # names rows for error messages
    heldout: Sequence[Pack]
    run: RunDirectory
    adapter: AdapterFacts
    facts: Mapping[str, Any]
    observe: Observer


def train(
    job: Job, state: TrainState, stop: Callable[[], bool], save_now: Callable[[], bool] = lambda: False
) -> Literal["finished", "interrupted"]:
    """Train from `state` to the end, or until `stop()` asks to end after the current step; both are saved.

    `save_now()` asks for a checkpoint after the current step. Raises TrainingError, before any weight changes, when
    a step's loss or gradient is not finite or it has no supervised tokens; RunError when a checkpoint cannot be
    written or memory runs out (then the state before that step is saved).
    """
    job.network.train()
    with Saver(job.run, job.settings.keep, job.facts, job.observe) as saver:
        if state.measuring_due and _measure(job, saver, state):
            _save(job, saver, state, "best")
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
) -> Literal["finished", "interrupted"]:
    """The steps; the rows of the next one are laid out by `ahead` while the device works."""
    settings = job.settings
    meter = Meter()
    device = job.network.lm_head.weight.device
    upcoming = ahead.submit(_packs, job, state, state.step)
    while state.step < settings.num_steps:
        started = time.perf_counter()
        indices, packs = upcoming.result()
        upcoming = ahead.submit(_packs, job, state, state.step + 1)
        supervised = sum(len(pack.targets) for pack in packs)

        gradients = _gradients(job, state, packs, supervised, indices)
        if gradients is None:
            _shrink(job, saver, state, packs)
            upcoming = ahead.submit(_packs, job, state, state.step)
            continue
        loss, norm = gradients
        rate = learning_rate(
            state.step, settings.num_steps, settings.learning_rate, settings.schedule, settings.warmup
        )
        for group in job.optimizer.param_groups:
            group["lr"] = rate
        job.optimizer.step()
        job.optimizer.zero_grad()
        state.step += 1
        state.last_loss = loss
        state.scale.went_well()
        give_back_memory(MUCH_FREE)

        tokens = sum(pack.num_tokens for pack in packs)
        seconds = time.perf_counter() - started
        job.observe(
            Step(
                step=state.step,
                num_steps=settings.num_steps,
                epoch=round(job.order.epoch_at(state.step), 4),
                loss=loss,
                learning_rate=rate,
                grad_norm=norm,
                supervised_tokens=supervised,
                tokens=tokens,
                rows=len(indices),
                tokens_per_second=meter.update(tokens, seconds),
                seconds=seconds,
                memory_bytes=device_memory_bytes(device) or Meter.memory_bytes(),
            )
        )
        saver.settle(wait=False)
        stopping = stop()
        ended = state.step == settings.num_steps
        due = ended or _due(state.step, settings.eval_every, job.order)
        state.measuring_due = due and bool(job.heldout)
        better = state.measuring_due and not stopping and _measure(job, saver, state)
        stopping = stopping or stop()  # measuring may take as long as many steps
        asked = save_now()
        if stopping or ended or better or asked or _due(state.step, settings.save_every, job.order):
            reason = "stopped" if stopping else "best" if better else "finished" if ended else "due"
            _save(job, saver, state, "asked for" if asked and reason == "due" else reason)
        if stopping and (not ended or state.measuring_due):
            return "interrupted"
    return "finished"


def _packs(job: Job, state: TrainState, step: int) -> tuple[NDArray[np.int64], list[Pack]]:
    """The rows of a step and how they are laid out: a function of the step, so it can be made ahead."""
    indices, settings = job.order.rows(step), job.settings
    capacity = state.micro_batch_tokens or settings.micro_batch_tokens
    return indices, make_packs([job.rows.row(i) for i in indices], capacity, settings.packing)


def _gradients(
    job: Job, state: TrainState, packs: Sequence[Pack], supervised: int, indices: NDArray[np.int64]
) -> tuple[float, float] | None:
    """Accumulate the step's gradient, clipped; returns (mean loss, norm before clipping), both finite.

    The sum of losses over all packs is divided once by the step's supervised tokens, so the gradient does not
    depend on how the rows were laid out. A float16 overflow is repeated with the same rows and random numbers.
    None says that memory ran out; then everything is as before the step.
    """
    step = state.step + 1
    if supervised == 0:
        raise TrainingError(f"step {step} has no supervised tokens", place=job.places(indices))
    random = torch.get_rng_state()
    while True:
        losses = []
        try:
            for pack in packs:
                loss = pack_loss(job.network, pack)
                give_back_memory(MUCH_FREE)
                (loss * (state.scale.factor / supervised)).backward()
                losses.append(loss.detach())
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            job.optimizer.zero_grad()
            torch.set_rng_state(random)
            return None
        mean = sum(map(float, losses)) / supervised  # read only here: a device is waited for once
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
                place=job.places(indices),
                hint="lower train.learning_rate, or look at these rows; the last checkpoint can be resumed",
            )
        state.scale.overflowed(step)
        torch.set_rng_state(random)


def _measure(job: Job, saver: Saver, state: TrainState) -> bool:
    """Held-out loss now, and once of the base; True when the adapter is the best so far.

    Raises RunError when memory runs out; then the step is saved, and a resume makes up the measurement.
    """

    def measuring(done: int, total: int) -> None:
        job.observe(Busy("measuring held-out rows", done, total))

    try:
        if state.base_loss is None:
            set_enabled(job.network, False)
            state.base_loss = heldout_loss(job.network, job.heldout, measuring)
            set_enabled(job.network, True)
        loss = heldout_loss(job.network, job.heldout, measuring)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        _out_of_memory(job, saver, state, "measuring held-out rows", job.heldout)
    state.measuring_due = False
    better = state.best_loss is None or loss < state.best_loss
    if better:
        state.best_loss, state.best_step = loss, state.step
    job.observe(Heldout(state.step, loss, state.base_loss, better))
    return better


def _shrink(job: Job, saver: Saver, state: TrainState, packs: Sequence[Pack]) -> None:
    """Memory ran out: halve the passes where that was asked for and helps, else save and raise RunError."""
    largest = max(pack.num_tokens for pack in packs)
    if job.settings.halve and any(len(pack.lengths) > 1 for pack in packs):
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
    _out_of_memory(job, saver, state, f"in step {state.step + 1}", packs)


def _out_of_memory(job: Job, saver: Saver, state: TrainState, where: str, packs: Sequence[Pack]) -> NoReturn:
    """Save the state and raise RunError with what would make passes like `packs` smaller."""
    saved = ""
    if state.step:
        if state.step not in job.run.saved_steps():
            _save(job, saver, state, "out of memory")
        saver.settle(wait=True)
        saved = f"; step {state.step} is saved and verified"
    hint = "one row fills the pass: train.recompute=layers takes a fraction of the memory"
    if any(len(pack.lengths) > 1 for pack in packs):
        smaller = f"train.micro_batch_tokens={max(8, max(pack.num_tokens for pack in packs) // 2)}"
        hint = f"go on with `lorafit train --resume {job.run.path} {smaller}`: memory, never mathematics"
    raise RunError(f"out of memory {where}{saved}", place=str(job.run.path), hint=hint)


def _save(job: Job, saver: Saver, state: TrainState, reason: str) -> None:
    """Copy the state and have it committed while training goes on."""
    saver.save(snapshot(job.network, job.optimizer, state, job.adapter), reason)


def _due(step: int, every: int, order: RowOrder) -> bool:
    """Whether something that happens every so many steps (0 is every epoch) happens after `step`."""
    return step % (every or order.steps_per_epoch) == 0
