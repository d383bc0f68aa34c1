"""A trial of the real model before a run: does every adapter tensor get a gradient, is the loss one to expect.

B starts at zero, so at the first step no gradient reaches A: what flows back into A is B's transpose times a slope.
The probe therefore takes two: gradients at the start (B's are looked at, and A's where B is not zero), one step of
AdamW at the peak learning rate, gradients again (A's). Then everything is put back to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorafit.check.verdict import CheckResult, Outcome, of_error, refuse_failed
from lorafit.config.schema import Config
from lorafit.data.build import TrainingData
from lorafit.data.packing import Pack, Packer
from lorafit.errors import LorafitError
from lorafit.forward import pack_loss
from lorafit.model.adamw import EPS
from lorafit.model.build import build
from lorafit.model.llama import Llama
from lorafit.model.lora import LoraLinear, adapted, disable_adapter, evaluating
from lorafit.model.memory import is_out_of_memory, release_free_memory
from lorafit.observe.progress import progress
from lorafit.observe.units import duration, memory_size
from lorafit.plan.machine import Machine
from lorafit.plan.planner import RunInputs, fit, make_plan
from lorafit.plan.predict import Plan

_FLOAT16_SCALES = tuple(2.0**power for power in (16, 12, 8, 4, 0))
_KNOWN_BY_HEART = 0.01
_LISTED = 3


@dataclass(frozen=True, slots=True)
class Measured:
    """What the probe saw; losses are means over `targets` supervised tokens.

    `uniform` is the loss of a guess over the whole vocabulary, `base` the model's without adapter, `before` and
    `after` those with it and around the trial step. `dead` and `wild` name adapter tensors whose gradient is zero
    or not finite.
    """

    targets: int
    uniform: float
    base: float
    before: float
    after: float
    num_tensors: int
    dead: tuple[str, ...]
    wild: tuple[str, ...]


def probe(network: Llama, packs: Sequence[Pack], learning_rate: float) -> Measured:
    """Take one trial step on `packs` and put the network back as it was: weights, gradients, mode, random state."""
    layers = adapted(network)
    started = any(bool(layer.lora_B.any()) for layer in layers.values())
    base = None
    with _restored(network), evaluating(network):  # no dropout: nothing random is drawn
        if started:
            with disable_adapter(network):
                base = _loss(network, packs)
        before, gradients = _gradients(network, packs, layers)
        all_started = all(bool(layer.lora_B.any()) for layer in layers.values())
        looked_at = {n: g for n, g in gradients.items() if all_started or n.endswith("lora_B")}
        with torch.no_grad():
            for name, layer in layers.items():
                gradient = gradients[f"{name}.lora_B"]
                layer.lora_B.sub_(learning_rate * gradient / (gradient.abs() + EPS))
        after, gradients = _gradients(network, packs, layers)
        looked_at |= {name: g for name, g in gradients.items() if name not in looked_at}
    wild = tuple(name for name, g in looked_at.items() if not bool(torch.isfinite(g).all()))
    dead = tuple(name for name, g in looked_at.items() if name not in wild and not bool(g.any()))
    targets = sum(len(pack.targets) for pack in packs)
    uniform = math.log(network.arch.vocab_size)
    return Measured(
        targets, uniform, before if base is None else base, before, after, len(looked_at), dead, wild
    )


@contextmanager
def _restored(network: Llama) -> Iterator[None]:
    """Put the adapter's second matrices back after the block, to the bit, and free all gradients."""
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


def probe_verdicts(seen: Measured, learning_rate: float) -> list[CheckResult]:
    """What the probe says: gradients, loss, and whether the peak learning rate goes downhill."""
    return [_of_gradients(seen), _of_loss(seen), _of_rate(seen, learning_rate)]


def _loss(network: Llama, packs: Sequence[Pack]) -> float:
    with torch.inference_mode():
        total = sum(float(pack_loss(network, pack)) for pack in packs)
    return total / max(1, sum(len(pack.targets) for pack in packs))


def _gradients(
    network: Llama, packs: Sequence[Pack], layers: dict[str, LoraLinear]
) -> tuple[float, dict[str, Tensor]]:
    """(mean loss, gradient of every adapter tensor; zeros where there is none). Float16 is scaled as in training."""
    targets = max(1, sum(len(pack.targets) for pack in packs))
    adapter_parameters = {
        f"{name}.{part}": getattr(layer, part)
        for name, layer in layers.items()
        for part in ("lora_A", "lora_B")
    }
    scales = _FLOAT16_SCALES if network.lm_head.weight.dtype == torch.float16 else (1.0,)
    total, found = math.nan, dict[str, Tensor]()
    for scale in scales:
        for parameter in adapter_parameters.values():
            parameter.grad = None
        total = 0.0
        for pack in packs:
            loss = pack_loss(network, pack)
            (loss * (scale / targets)).backward()
            total += float(loss.detach())
        found = {
            name: torch.zeros_like(m) if m.grad is None else m.grad / scale
            for name, m in adapter_parameters.items()
        }
        if all(bool(torch.isfinite(g).all()) for g in found.values()):
            break
    return total / targets, found


def _of_gradients(seen: Measured) -> CheckResult:
    name = "gradients"
    for names, what in ((seen.wild, "have a gradient that is not finite"), (seen.dead, "get no gradient")):
        if names:
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            message = f"{len(names)} of {seen.num_tensors} adapter tensors {what}: {', '.join(names[:_LISTED])}{more}"
            hint = "they would never learn; try model.dtype=float32, or other lora.targets"
            return CheckResult(name, "fail", message, "lora.targets", hint)
    return CheckResult(
        name, "pass", f"all {seen.num_tensors} adapter tensors get one (B at once, A after one step)"
    )


def _of_loss(seen: Measured) -> CheckResult:
    name = "loss"
    if not math.isfinite(seen.before):
        hint = "the weights are damaged, or model.dtype=float32 is needed"
        return CheckResult(name, "fail", f"it is {seen.before} on the first rows", "model.name", hint)
    message = (
        f"base {seen.base:.3f} on {seen.targets:,} supervised tokens, a blind guess has {seen.uniform:.3f}"
    )
    if seen.before != seen.base:
        message += f", with the adapter to continue {seen.before:.3f}"
    if seen.base > seen.uniform:
        hint = "do weights and tokenizer belong together?"
        return CheckResult(name, "warn", f"{message}: worse than guessing", "model.name", hint)
    if seen.base < _KNOWN_BY_HEART:
        message += ": the model knows these rows by heart"
        return CheckResult(name, "warn", message, "data.path", "was it trained on them already?")
    return CheckResult(name, "pass", message)


def _of_rate(seen: Measured, learning_rate: float) -> CheckResult:
    name, key = "trial step", "train.learning_rate"
    message = f"one step at the peak rate {learning_rate:g} takes the loss from {seen.before:.3f} to {seen.after:.3f}"
    if not seen.after <= 1.02 * seen.before + 1e-3:  # also where it is not a number
        return CheckResult(name, "warn", f"{message}: too high", key, "a third of it, or longer train.warmup")
    return CheckResult(name, "pass", message)


PROBE_ROWS = 8  # of about the median length: enough that every adapter tensor has something to do
_MOST_SHARE = 0.02  # of a run's tokens that a probe before it may take
_PASSES = 3  # the probe's, a forward and a backward each, at most
_FEW_FLOPS = 3e10  # less than a second on any machine
_FLOPS_A_PARAMETER = 6  # forward and backward, a token


def model_verdicts(config: Config, data: RunInputs, machine: Machine, quiet: bool) -> list[CheckResult]:
    """Memory by the plan's real pass over the longest pack, then the probe. Errors become verdicts that fail."""
    try:
        fitted = fit(config, data, machine)
        config = fitted.config
        with progress("loading the model", quiet=quiet) as advance:
            built = build(config, data.base.path, machine.device, advance)
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
        return [*probe_verdicts(probe(built.network, packs, rate), rate), memory]


def trial_before_training(config: Config, data: RunInputs, network: Llama) -> list[CheckResult]:
    """The probe on one row, before a run that it costs next to nothing; else none.

    Raises DataError with what fails, unless `run.check` says to go on.
    """
    packs = probe_packs(data.training_data, 1, config)
    tokens = _PASSES * sum(pack.num_tokens for pack in packs)
    flops = _FLOPS_A_PARAMETER * tokens * network.arch.num_parameters
    if flops > _FEW_FLOPS and tokens > _MOST_SHARE * data.workload(config).tokens:
        return []
    network.recompute = config.train.recompute == "layers"
    rate = config.train.learning_rate
    verdicts = probe_verdicts(probe(network, packs, rate), rate)
    if any(verdict.verdict == "fail" for verdict in verdicts):  # one row may be an odd one
        packs = probe_packs(data.training_data, PROBE_ROWS, config)
        verdicts = probe_verdicts(probe(network, packs, rate), rate)
    if config.run.check == "error":
        refuse_failed(verdicts)
    return verdicts


def probe_packs(training_data: TrainingData, count: int, config: Config) -> list[Pack]:
    """`count` training rows of about the median length, laid out as training lays them."""
    lengths = training_data.training.lengths
    near = np.argsort(np.abs(lengths - np.median(lengths)), kind="stable")[:count]
    rows = [training_data.training.row(int(index)) for index in near]
    return Packer(config.train.micro_batch_tokens, config.data.packing).packs(rows)


def _of_memory(plan: Plan, config: Config) -> CheckResult:
    longest = f"longest pack {plan.longest_pack_tokens:,} tokens"
    message = f"peak {memory_size(plan.peak_bytes)}, {longest}"
    if plan.available_bytes is not None:
        message += f", {memory_size(plan.available_bytes)} can be had"
    if plan.times is not None:
        message += f"; about {duration(plan.times.total)}"
    if plan.fits:
        return CheckResult("memory", "pass", message)
    outcome: Outcome = "warn" if config.run.too_large == "try" else "fail"
    hint = "`--auto` picks settings that fit"
    return CheckResult("memory", outcome, f"{message}: not enough", "train.micro_batch_tokens", hint)
