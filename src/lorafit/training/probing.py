"""The model's part of a check: the plan's memory, and the probe on rows of the run."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np

from lorafit.check.plan import Plan
from lorafit.check.probe import probe, probe_verdicts
from lorafit.check.verdict import Outcome, Verdict, of_error, refuse_failed
from lorafit.config.schema import Config
from lorafit.data.packing import Pack, make_packs
from lorafit.errors import LorafitError
from lorafit.model.build import build
from lorafit.model.llama import Llama
from lorafit.model.memory import is_out_of_memory
from lorafit.observe.terminal import duration, memory_size, progress
from lorafit.training.material import Material
from lorafit.training.planning import Planner

PROBE_ROWS = 8  # of about the median length: enough that every adapter tensor has something to do
_MOST_SHARE = 0.02  # of a run's tokens that a probe before it may take
_PASSES = 3  # the probe's, a forward and a backward each, at most
_FEW_FLOPS = 3e10  # less than a second on any machine
_FLOPS_A_PARAMETER = 6  # forward and backward, a token


def model_verdicts(planner: Planner, quiet: bool) -> list[Verdict]:
    """Memory by the plan's real pass over the longest pack, then the probe. Errors become verdicts that fail."""
    try:
        config = planner.fit()
        with nullcontext() if quiet else progress("loading the model") as advance:
            built = build(config, planner.base.path, advance)
    except LorafitError as error:
        return of_error(error)
    with nullcontext() if quiet else progress("a trial step"):
        try:
            memory = _of_memory(planner.plan(built.network, calibrated=True), config)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            hint = f"set it below {config.train.micro_batch_tokens}, or train.recompute=layers"
            message = "the longest pack does not fit"
            return [Verdict("memory", "fail", message, "train.micro_batch_tokens", hint)]
        packs = probe_packs(planner.material, PROBE_ROWS, config)
        rate = config.train.learning_rate
        return [*probe_verdicts(probe(built.network, packs, rate), rate), memory]


def trial_before_training(config: Config, planner: Planner, network: Llama) -> list[Verdict]:
    """The probe on one row, before a run that it costs next to nothing; else none.

    Raises DataError with what fails, unless `run.check` says to go on.
    """
    packs = probe_packs(planner.material, 1, config)
    tokens = _PASSES * sum(pack.num_tokens for pack in packs)
    flops = _FLOPS_A_PARAMETER * tokens * network.arch.num_parameters
    if flops > _FEW_FLOPS and tokens > _MOST_SHARE * planner.num_tokens:
        return []
    network.recompute = config.train.recompute == "layers"
    rate = config.train.learning_rate
    verdicts = probe_verdicts(probe(network, packs, rate), rate)
    if any(verdict.verdict == "fail" for verdict in verdicts):  # one row may be an odd one
        packs = probe_packs(planner.material, PROBE_ROWS, config)
        verdicts = probe_verdicts(probe(network, packs, rate), rate)
    if config.run.check == "error":
        refuse_failed(verdicts)
    return verdicts


def probe_packs(material: Material, count: int, config: Config) -> list[Pack]:
    """`count` training rows of about the median length, laid out as training lays them."""
    lengths = material.training.lengths
    near = np.argsort(np.abs(lengths - np.median(lengths)), kind="stable")[:count]
    rows = [material.training.row(int(index)) for index in near]
    return make_packs(rows, config.train.micro_batch_tokens, config.data.packing)


def _of_memory(plan: Plan, config: Config) -> Verdict:
    longest = f"longest pack {plan.longest_pack_tokens:,} tokens"
    message = f"peak {memory_size(plan.peak_bytes)}, {longest}"
    if plan.available_bytes is not None:
        message += f", {memory_size(plan.available_bytes)} can be had"
    if plan.times is not None:
        message += f"; about {duration(plan.times.total)}"
    if plan.fits:
        return Verdict("memory", "pass", message)
    outcome: Outcome = "warn" if config.run.too_large == "try" else "fail"
    hint = "`--auto` picks settings that fit"
    return Verdict("memory", outcome, f"{message}: not enough", "train.micro_batch_tokens", hint)
