"""The second phase of a run: all rows, from the beginning, for the length that the held-out rows chose.

It computes what a run of this length with `data.holdout=0` computes, to the bit. Its steps are numbered on from those
of the first phase.
"""

from __future__ import annotations

from dataclasses import replace

from lorafit.data.build import row_order
from lorafit.model.adapter_file import fill_adapter
from lorafit.observe.events import Refit
from lorafit.plan.cadence import Cadence
from lorafit.training.checkpoint import TrainState, seed_random
from lorafit.training.loop import Outcome, TrainContext
from lorafit.training.loss_scale import LossScale
from lorafit.training.optim import make_optimizer
from lorafit.training.stream_cache import keep_streams


def is_due(job: TrainContext, state: TrainState, outcome: Outcome) -> bool:
    """Whether the first phase is over and a second one follows."""
    over = outcome != "interrupted" and state.refit_from is None
    return over and job.config.train.refit and state.best_step is not None


def begin(job: TrainContext, state: TrainState) -> tuple[TrainContext, TrainState]:
    """Context and state of the second phase: adapter, optimizer and random generators are as before the first step."""
    chosen = state.best_step if job.config.train.keep_best else state.step
    assert chosen is not None
    steps_per_epoch = row_order(job.config, job.data.with_all_rows()).steps_per_epoch
    began = TrainState(
        step=state.step,
        base_loss=state.base_loss,
        best_loss=state.best_loss,
        micro_batch_tokens=state.micro_batch_tokens,
        scale=LossScale.for_dtype(job.prepared.built.dtype),
        refit_from=state.step,
        refit_steps=max(1, round(chosen * steps_per_epoch / job.order.steps_per_epoch)),
        chosen_step=chosen,
    )
    fill_adapter(job.network, job.initial, job.run.path)
    seed_random(job.config.train.seed)
    job = context(replace(job, optimizer=make_optimizer(job.network, job.config)), began)
    job.observe(Refit(state.step, job.num_steps, len(job.rows), chosen, state.best_loss))
    return job, began


def context(job: TrainContext, state: TrainState) -> TrainContext:
    """The context of the second phase that `state` is in."""
    assert state.refit_from is not None
    everything = job.data.with_all_rows()
    order = row_order(job.config, everything)
    epochs = state.refit_steps / order.steps_per_epoch
    return replace(
        job,
        rows=everything.training,
        kept=keep_streams(job.config, job.engine, everything.training, epochs, job.run.path, job.observe),
        order=order,
        heldout=(),
        cadence=Cadence.of(job.config, state.refit_steps, order.steps_per_epoch),
        first_step=state.refit_from,
    )
