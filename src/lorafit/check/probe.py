"""A trial step of the real model before a run: does every adapter tensor get a gradient, is the loss plausible.

B starts at zero, so at the first step A has no gradient: the gradient of A is B's transpose times the gradient of the
output. The probe therefore computes gradients twice: at the start (of B, and of A where B is not zero), and after one
step of AdamW at the peak learning rate (of A). Then all weights are restored to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorafit.check.disk import disk_verdicts
from lorafit.check.model_checks import answer_verdicts, stop_token_verdicts
from lorafit.check.verdict import of_error, refuse_failed
from lorafit.config.schema import Config
from lorafit.data.build import TrainingData
from lorafit.data.packing import Pack, Packer
from lorafit.errors import CheckResult, LorafitError, Outcome
from lorafit.forward import pack_loss
from lorafit.model.adamw import EPS
from lorafit.model.build import build
from lorafit.model.llama import Llama
from lorafit.model.lora import adapted, adapter_parameters, disable_adapter, evaluating
from lorafit.model.memory import is_out_of_memory, release_free_memory
from lorafit.observe.progress import progress
from lorafit.observe.units import duration, memory_size
from lorafit.plan.machine import Machine
from lorafit.plan.planner import RunInputs, fit, make_plan
from lorafit.plan.predict import Plan

_FLOAT16_SCALES = tuple(2.0**power for power in (16, 12, 8, 4, 0))
_SEEN_LOSS = 0.01  # below, the model has probably seen the rows
_LISTED = 3
PROBE_ROWS = 8  # of about the median length: enough for a gradient of every adapter tensor
_MOST_SHARE = 0.02  # of a run's tokens that its probe may take
_PASSES = 3  # forward and backward passes of the probe, at most
_FEW_FLOPS = 3e10  # less than a second on any machine
_FLOPS_PER_PARAMETER = 6  # forward and backward, per token


@dataclass(frozen=True, slots=True)
class Measured:
    """The measurements of the probe; losses are means over `targets` supervised tokens.

    `uniform` is the loss of a uniform guess over the vocabulary, `base` that of the model without adapter, `before`
    and `after` those with it before and after the trial step. `zero` and `non_finite` are the names of the adapter
    tensors with such gradients.
    """

    targets: int
    uniform: float
    base: float
    before: float
    after: float
    num_tensors: int
    zero: tuple[str, ...]
    non_finite: tuple[str, ...]


def probe(network: Llama, packs: Sequence[Pack], learning_rate: float) -> Measured:
    """Take one trial step on `packs` and restore the network: weights, gradients, mode, random state."""
    layers = adapted(network)
    started = any(bool(layer.lora_B.any()) for layer in layers.values())
    base = None
    with _restored(network), evaluating(network):  # no dropout, so no random state is used
        if started:
            with disable_adapter(network):
                base = _loss(network, packs)
        before, gradients = _gradients(network, packs)
        all_started = all(bool(layer.lora_B.any()) for layer in layers.values())
        checked = {n: g for n, g in gradients.items() if all_started or n.endswith("lora_B")}
        with torch.no_grad():
            for name, layer in layers.items():
                gradient = gradients[f"{name}.lora_B"]
                layer.lora_B.sub_(learning_rate * gradient / (gradient.abs() + EPS))
        after, gradients = _gradients(network, packs)
        checked |= {name: g for name, g in gradients.items() if name not in checked}
    non_finite = tuple(name for name, g in checked.items() if not bool(torch.isfinite(g).all()))
    zero = tuple(name for name, g in checked.items() if name not in non_finite and not bool(g.any()))
    targets = sum(len(pack.targets) for pack in packs)
    uniform = math.log(network.arch.vocab_size)
    return Measured(
        targets, uniform, before if base is None else base, before, after, len(checked), zero, non_finite
    )


@contextmanager
def _restored(network: Llama) -> Iterator[None]:
    """Restore the B matrices after the block, to the bit, and free all gradients."""
    kept = {name: layer.lora_B.detach().clone() for name, layer in adapted(network).items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, layer in adapted(network).items():
                layer.lora_B.copy_(kept[name])
        for parameter in network.parameters():
            parameter.grad = None
        release_free_memory()


def probe_verdicts(probed: Measured, learning_rate: float) -> list[CheckResult]:
    """The results of the probe: gradients, loss, and whether a step at the peak learning rate lowers the loss."""
    return [_of_gradients(probed), _of_loss(probed), _of_rate(probed, learning_rate)]


def _loss(network: Llama, packs: Sequence[Pack]) -> float:
    with torch.inference_mode():
        total = sum(float(pack_loss(network, pack)) for pack in packs)
    return total / (sum(pack.weight for pack in packs) or 1)


def _gradients(network: Llama, packs: Sequence[Pack]) -> tuple[float, dict[str, Tensor]]:
    """(mean loss, gradient of every adapter tensor; zeros where there is none). Float16 is scaled as in training."""
    weight = sum(pack.weight for pack in packs) or 1
    parameters = adapter_parameters(network)
    scales = _FLOAT16_SCALES if network.lm_head.weight.dtype == torch.float16 else (1.0,)
    total, gradients = math.nan, dict[str, Tensor]()
    for scale in scales:
        for parameter in parameters.values():
            parameter.grad = None
        total = 0.0
        for pack in packs:
            loss = pack_loss(network, pack)
            (loss * (scale / weight)).backward()
            total += float(loss.detach())
        gradients = {
            name: torch.zeros_like(m) if m.grad is None else m.grad / scale for name, m in parameters.items()
        }
        if all(bool(torch.isfinite(g).all()) for g in gradients.values()):
            break
    return total / weight, gradients


def _of_gradients(probed: Measured) -> CheckResult:
    name = "gradients"
    for names, what in (
        (probed.non_finite, "have a gradient that is not finite"),
        (probed.zero, "get no gradient"),
    ):
        if names:
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            message = f"{len(names)} of {probed.num_tensors} adapter tensors {what}: "
            message += ", ".join(names[:_LISTED]) + more
            hint = "they would not be trained; try model.dtype=float32, or other lora.targets"
            return CheckResult(name, "fail", message, "lora.targets", hint)
    return CheckResult(
        name, "pass", f"all {probed.num_tensors} adapter tensors get one (B at once, A after one step)"
    )


def _of_loss(probed: Measured) -> CheckResult:
    name = "loss"
    if not math.isfinite(probed.before):
        hint = "the weights are damaged, or model.dtype=float32 is needed"
        return CheckResult(name, "fail", f"it is {probed.before} on the first rows", "model.name", hint)
    message = f"base loss {probed.base:.3f} on {probed.targets:,} supervised tokens "
    message += f"(uniform guess: {probed.uniform:.3f})"
    if probed.before != probed.base:
        message += f", with the adapter {probed.before:.3f}"
    if probed.base > probed.uniform:
        hint = "the rows hold names or a language that the model does not know, or the tokenizer is of another model"
        return CheckResult(name, "warn", f"{message}: worse than guessing", "model.name", hint)
    if probed.base < _SEEN_LOSS:
        message += ": the base model has probably seen these rows"
        return CheckResult(name, "warn", message, "data.path", "was it trained on them already?")
    return CheckResult(name, "pass", message)


def _of_rate(probed: Measured, learning_rate: float) -> CheckResult:
    name, key = "trial step", "train.learning_rate"
    losses = f"from {probed.before:.3f} to {probed.after:.3f}"
    message = f"one step at the peak rate {learning_rate:g} takes the loss {losses}"
    if not probed.after <= 1.02 * probed.before + 1e-3:  # also where it is not a number
        return CheckResult(name, "warn", f"{message}: too high", key, "a third of it, or longer train.warmup")
    return CheckResult(name, "pass", message)


def model_verdicts(config: Config, data: RunInputs, machine: Machine, quiet: bool) -> list[CheckResult]:
    """The results of the plan's real pass over the longest pack, and of the probe. Errors become results that fail."""
    try:
        fitted = fit(config, data, machine)
        config = fitted.config
        with progress("loading the model", quiet=quiet) as advance:
            tokens = data.training_data.tokenizer.trained
            built = build(config, data.base.path, machine.device, advance, tokens=tokens)
    except LorafitError as error:
        return of_error(error)
    with progress("a trial step", quiet=quiet):
        try:
            memory = _of_memory(make_plan(fitted, data, machine, built.network, calibrated=True), config)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            hint = f"set it below {config.train.micro_batch_tokens}, or train.recompute=layers"
            message = "the longest pack does not fit"
            return [CheckResult("memory", "fail", message, "train.micro_batch_tokens", hint)]
        packs = probe_packs(data.training_data, PROBE_ROWS, config)
        rate = config.train.learning_rate
        return [
            *probe_verdicts(probe(built.network, packs, rate), rate),
            *stop_token_verdicts(config, data.training_data, built.network),
            *answer_verdicts(config, data.training_data, built.network),
            memory,
            *disk_verdicts(config, data, built.network),
        ]


def trial_before_training(config: Config, data: RunInputs, network: Llama) -> list[CheckResult]:
    """The results of the stop token, and of the probe on one row where that takes no large part of the run.

    Raises DataError with all that fails, unless `run.check` is not `error`.
    """
    stop = stop_token_verdicts(config, data.training_data, network)
    packs = probe_packs(data.training_data, 1, config)
    tokens = _PASSES * sum(pack.num_tokens for pack in packs)
    flops = _FLOPS_PER_PARAMETER * tokens * network.arch.num_parameters
    if flops > _FEW_FLOPS and tokens > _MOST_SHARE * data.workload(config).tokens:
        return stop
    network.recompute = config.train.recompute == "layers"
    rate = config.train.learning_rate
    try:
        verdicts = probe_verdicts(probe(network, packs, rate), rate)
        if any(verdict.verdict == "fail" for verdict in verdicts):  # one row may be unusual
            packs = probe_packs(data.training_data, PROBE_ROWS, config)
            verdicts = probe_verdicts(probe(network, packs, rate), rate)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return [*stop, CheckResult("memory", "warn", "not enough for the trial step, which is left out")]
    if config.run.check == "error":
        refuse_failed(verdicts)
    return [*verdicts, *stop]


def probe_packs(training_data: TrainingData, count: int, config: Config) -> list[Pack]:
    """`count` training rows of about the median length, packed as training packs them."""
    lengths = training_data.training.lengths
    near = np.argsort(np.abs(lengths - np.median(lengths)), kind="stable")[:count]
    rows = [training_data.training.row(int(index)) for index in near]
    return Packer(config.train.micro_batch_tokens, config.data.packing).packs(rows)


def _of_memory(plan: Plan, config: Config) -> CheckResult:
    longest = f"longest pack {plan.longest_pack_tokens:,} tokens"
    message = f"peak {memory_size(plan.peak_bytes)}, {longest}"
    if plan.available_bytes is not None:
        message += f", {memory_size(plan.available_bytes)} available"
    if plan.times is not None:
        message += f"; about {duration(plan.times.total)}"
    if plan.fits:
        return CheckResult("memory", "pass", message)
    outcome: Outcome = "warn" if config.run.too_large == "try" else "fail"
    hint = "`--auto` picks settings that fit"
    return CheckResult("memory", outcome, f"{message}: not enough", "train.micro_batch_tokens", hint)
