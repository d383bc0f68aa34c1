"""What a run will take before it starts: tokens, steps, memory and time, and what would fit where it does not.

The formula (plan/cost_model.py) knows how costs grow; one real pass over the heaviest pack says what this machine
makes of it. Nothing here knows of a config or a run directory: plan/planner.py puts the two together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from lorafit.data.packing import Pack
from lorafit.forward import FILL, pack_loss
from lorafit.model.attention import PackedDocuments
from lorafit.model.linear import Frozen
from lorafit.model.llama import Llama
from lorafit.model.lora import evaluating
from lorafit.model.memory import MOST_KERNELS, SPARE_BYTES, release_free_memory
from lorafit.model.native import blocks
from lorafit.model.quant import Quantize
from lorafit.plan.cost_model import (
    PassCost,
    Shape,
    base_bytes,
    forward_flops,
    num_trainable,
    saved_bytes,
    training_flops,
    working_bytes,
)
from lorafit.plan.machine import CONTEXT_BYTES, watch_peak
from lorafit.plan.workload import Workload

_PASS_SECONDS = 1e-3  # what a pass costs a layer however small it is, where nothing was measured
_STEP_SECONDS = 6e-3  # AdamW's calls, clipping, laying packs, recording: per optimizer step
_ENDS_SECONDS = 1.0  # making the run directory, digests, exporting the adapter, leaving the process
_OPTIMIZER_SECONDS = 8e-9  # AdamW and clipping, per parameter of the adapter
_SAVE_SECONDS, _SAVED_BYTES_PER_SECOND = 0.05, 2.5e8  # a checkpoint: synced, then read back
_PROOF_PASSES = 4  # base and tuned, trained and loaded
_USUAL_SHARE = 0.7  # a whole pass beside one large product, in FLOPs a second
_SHORT_PACK = 0.2  # a second, shorter pack is timed twice where it costs less than this share of the heaviest
_MOST_PACKS, _SEVERAL_SECONDS = 12, 2.0  # more packs are timed as long as all take less than so long
_LONG_SECONDS = 1.0  # what is timed several times is not begun again after so long
_MIN_MICRO_BATCH = 128  # smaller ones save nothing worth their time
_LIBRARIES_BYTES = 80 * 10**6  # what torch loads and allocates once at the first products
# On a CPU, torch's library (oneDNN) compiles small 16-bit products anew for every number of rows and keeps some of them
# (model/memory.py). Measured: about four for a pass of a new size.
_ONE_KERNEL = 14 * 10**5
_KERNEL_BYTES, _MOST_KERNEL_BYTES = 4 * _ONE_KERNEL, MOST_KERNELS * _ONE_KERNEL


@dataclass(frozen=True, slots=True)
class Choice:
    """What decides the memory of a run without deciding what it computes (but for `quantize`)."""

    micro_batch_tokens: int
    recompute: bool
    quantize: Quantize


@dataclass(frozen=True, slots=True)
class Memory:
    """Predicted bytes at the peak of training, part by part.

    `rest` is what the real pass took beyond the formula (below it: negative); before one, a constant.
    """

    process: float
    base: float
    adapter: float  # masters, gradients, both of AdamW's moments
    activations: float  # what the heaviest pack keeps for its backward pass
    working: float  # what is alive for a moment: a layer's slopes, the chunk of logits
    kernels: float  # products compiled for the sizes of the passes, kept by torch's CPU library
    spare: float  # freed blocks that are kept for passes of other sizes
    rest: float

    @property
    def total(self) -> int:
        """All parts."""
        return round(
            self.process
            + self.base
            + self.adapter
            + self.activations
            + self.working
            + self.kernels
            + self.spare
            + self.rest
        )


@dataclass(frozen=True, slots=True)
class Times:
    """Predicted seconds of a whole run, part by part."""

    start: float  # and the end
    steps: float
    measuring: float
    saving: float
    answering: float  # held-out prompts, also those of the proof; at most
    proving: float  # a fresh process that loads the run, and the texts that it is asked

    @property
    def total(self) -> float:
        """All parts."""
        return self.start + self.steps + self.measuring + self.saving + self.answering + self.proving


@dataclass(frozen=True, slots=True)
class Throughput:
    """What this machine makes of the formula.

    `measured` is whether by real passes; then `peak_bytes` is the most memory of the heaviest one. `pass_seconds`
    is what a pass costs beside its FLOPs, `token_seconds` what one token of one answer takes, `seconds` what finding
    this out took.
    """

    flops_per_second: float
    pass_seconds: float
    token_seconds: float
    measured: bool
    seconds: float
    peak_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Schedule:
    """How often a run measures and saves, and what it answers and proves.

    `heldout` are the passes of one measurement. `answers` are the batches of prompts that it answers: their rows, and
    the most tokens of one. `proof` is the pass of which the proof compares the logits, None without one.
    """

    measurements: int
    heldout: Sequence[PassCost]
    saves: int
    answers: Sequence[tuple[int, int]]
    proof: PassCost | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will take. Tokens and steps are exact, memory and time predicted; see the parts.

    `shared_tokens` are, about, those with which rows of a pass begin alike: computed once, not for each row.

    `peak_bytes` is the process's most resident memory (on CUDA the device's), loading included; `available_bytes`
    is None where unknown. `picked` says what was chosen to make it fit.
    """

    parameters: int
    trainable: int
    rows: int
    steps: int
    passes: int
    tokens_per_epoch: int
    supervised_tokens_per_epoch: int
    tokens: int
    supervised_tokens: int
    shared_tokens: int
    longest_pack_tokens: int
    device: str
    dtype: str
    choice: Choice
    memory: Memory
    peak_bytes: int
    available_bytes: int | None
    times: Times | None
    rates: Throughput | None
    picked: str = ""

    @property
    def fits(self) -> bool:
        """Whether memory is enough, as far as anyone knows."""
        return self.available_bytes is None or self.memory.total <= self.available_bytes

    def as_dict(self) -> dict[str, Any]:
        """As JSON values, with the totals; bytes and seconds."""
        times = {**asdict(self.times), "total": self.times.total} if self.times else None
        memory = {**asdict(self.memory), "total": self.memory.total}
        return {**asdict(self), "memory": memory, "times": times, "fits": self.fits}


def heaviest(shape: Shape, work: Workload) -> int:
    """Index of the pass that takes the most memory."""
    order = np.lexsort((-work.passes[:, 1], -work.passes[:, 0]))
    supervised = work.passes[order, 1]
    most = np.maximum.accumulate(supervised)
    # only a pass that no longer one beats in supervised tokens can be it: memory grows with both
    front = order[np.concatenate(([True], supervised[1:] > most[:-1]))]
    return max(map(int, front), key=lambda at: _pass_bytes(shape, work.at(at)))


def _pass_bytes(shape: Shape, work: PassCost) -> float:
    return saved_bytes(shape, work) + working_bytes(shape, work)


def predict_memory(
    shape: Shape, work: Workload, device: torch.device, process: float, rates: Throughput | None = None
) -> Memory:
    """The parts of the peak; `process` is what was resident before the network was loaded.

    What the heaviest pack was measured to take replaces the sum of its parts.
    """
    index = heaviest(shape, work)
    number = 4 if shape.width < 8 else 8
    trainable = num_trainable(shape) * number
    on_cpu = device.type == "cpu"
    kernel_bytes = _KERNEL_BYTES if on_cpu and (shape.width == 2 or shape.quantize != "none") else 0
    sizes = len(np.unique(work.passes[:, :2], axis=0)) * work.weight
    activations = saved_bytes(shape, work.at(index))
    several = on_cpu and sizes > 1 and blocks() is not None
    found = Memory(
        process=process if on_cpu else CONTEXT_BYTES,
        base=base_bytes(shape),
        adapter=trainable * (4 if work.most_in_a_step > 1 else 3),
        activations=activations,
        working=working_bytes(shape, work.at(index)),
        kernels=min(kernel_bytes * sizes, _MOST_KERNEL_BYTES),
        spare=min(SPARE_BYTES, activations) if several else 0,
        rest=_LIBRARIES_BYTES if on_cpu else 0,
    )
    if rates is None or rates.peak_bytes is None:
        return found
    # one pass without an optimizer step: of the adapter only its masters were there, of the sizes one or two
    expected = (
        found.total - found.rest - found.adapter + trainable - found.kernels + 2 * kernel_bytes - found.spare
    )
    measured = rates.peak_bytes + (0 if on_cpu else CONTEXT_BYTES)
    return replace(found, rest=measured - expected)


def predict_times(
    shape: Shape,
    work: Workload,
    schedule: Schedule,
    rates: Throughput,
    start: float,
    fresh: float = 0.0,
    ranks: int = 1,
) -> Times:
    """The parts of the run's wall time.

    `start` is the seconds until the first step, `fresh` those that a fresh process takes to load the run. Of several
    `ranks` each is as fast as this process; what travels between them is not counted.
    """

    def forward(passes: Sequence[PassCost]) -> float:
        flops = sum(forward_flops(shape, one) for one in passes)
        return flops / rates.flops_per_second + len(passes) * rates.pass_seconds / 3

    trainable = num_trainable(shape)
    training = training_flops(shape, work.mean) * work.num_passes / rates.flops_per_second
    number = 4 if shape.width < 8 else 8
    one_save = _SAVE_SECONDS + trainable * number * 3 / _SAVED_BYTES_PER_SECOND
    # what each further row of a batch of answers takes
    one_row = forward_flops(shape, PassCost(FILL, FILL, 0)) / FILL / rates.flops_per_second
    return Times(
        start=start + _ENDS_SECONDS,
        steps=(training + work.num_passes * rates.pass_seconds) / ranks
        + work.steps * (_STEP_SECONDS + trainable * _OPTIMIZER_SECONDS),
        measuring=schedule.measurements * forward(schedule.heldout) / ranks,
        saving=schedule.saves * one_save,
        answering=sum(
            tokens * (rates.token_seconds + (rows - 1) * one_row) for rows, tokens in schedule.answers
        ),
        proving=fresh + _PROOF_PASSES * forward([schedule.proof]) if schedule.proof is not None else 0.0,
    )


def quick_rates(network: Llama) -> Throughput:
    """Rates from one product of the first linear, in a fraction of a second: good for an `about`."""
    started = time.perf_counter()
    base = next(module for module in network.modules() if isinstance(module, Frozen))
    weight = network.lm_head.weight
    rows = 256
    x = torch.ones(rows, base.in_features, dtype=weight.dtype, device=weight.device)
    with torch.inference_mode():
        seconds = _best_seconds(lambda: base(x), weight.device)
    rate = 2 * rows * base.in_features * base.out_features / seconds * _USUAL_SHARE
    constant, token = _PASS_SECONDS * len(network.model.layers), _token_seconds(network)
    return Throughput(rate, constant, token, False, time.perf_counter() - started)


@torch.inference_mode()
def _token_seconds(network: Llama) -> float:
    """Seconds of a pass of one token, as an answer takes it: all weights are read for it."""
    device = network.lm_head.weight.device
    with evaluating(network):
        ids, attend = torch.zeros(1, dtype=torch.int64, device=device), PackedDocuments([1], device)
        return _best_seconds(lambda: network.logits(network.hidden(ids, attend)), device)


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """The least of three times; of fewer where they take long."""
    best, started = float("inf"), time.perf_counter()
    for _ in range(3):
        if time.perf_counter() - started > _LONG_SECONDS:
            break
        _wait(device)
        before = time.perf_counter()
        work()
        _wait(device)
        best = min(best, time.perf_counter() - before)
    return best


def calibrate(
    network: Llama, shape: Shape, work: Workload, quick: Throughput, pack_of: Callable[[int], Pack]
) -> Throughput:
    """Rates and peak from real forward and backward passes over the heaviest pack and, where cheap, others.

    `quick` are the rates without. `pack_of(i)` makes the pack of the workload's pass i. Gradients are thrown away and
    the random state is put back: a run goes on as if this had not been. Masters must have no gradients.
    """
    started = time.perf_counter()
    device, was_training = network.lm_head.weight.device, network.training
    states = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    network.train()
    points: list[tuple[float, float]] = []  # (FLOPs, seconds)
    try:
        order = list(_order(shape, work))
        short, index, *others = order
        cheap = short != index and _flops(shape, work, short) < _SHORT_PACK * _flops(shape, work, index)
        if cheap:
            _one_pass(network, pack_of(short))  # the first products set things up
        network.model.embed_tokens.weight.count_nonzero()  # mapped from its file, and read in full by a whole run
        with watch_peak(device) as peak:
            seconds = _one_pass(network, pack_of(index))
        if not cheap and time.perf_counter() - started < _SEVERAL_SECONDS:
            seconds = _one_pass(network, pack_of(index))
        points.append((_flops(shape, work, index), seconds))
        if cheap:
            points.append((_flops(shape, work, short), _one_pass(network, pack_of(short))))
        for other in others:
            if time.perf_counter() - started > _SEVERAL_SECONDS:
                break
            points.append((_flops(shape, work, other), _one_pass(network, pack_of(other))))
    finally:
        for parameter in network.parameters():
            parameter.grad = None
        release_free_memory()
        network.train(was_training)
        torch.set_rng_state(states[0])
        if states[1] is not None:
            torch.cuda.set_rng_state(states[1], device)
    rate, constant = _line(points)
    return Throughput(
        rate, constant, quick.token_seconds, True, time.perf_counter() - started, peak.num_bytes
    )


def calibration_share(shape: Shape, work: Workload) -> float:
    """Which part of the run's passes calibrating would cost in addition, by the formula."""
    short, index, *_ = _order(shape, work)
    cost = _flops(shape, work, index) + 2 * min(
        _flops(shape, work, short), _SHORT_PACK * _flops(shape, work, index)
    )
    return cost / (training_flops(shape, work.mean) * work.num_passes)


def choices(given: Choice, work: Workload, can_int8: bool) -> Iterator[Choice]:
    """What to try where `given` does not fit, the cheapest first.

    Smaller passes cost nothing but their own start, recomputing a third of the time; int8 alone changes numbers.
    """
    sizes = [given.micro_batch_tokens]
    least = max(work.longest_row, _MIN_MICRO_BATCH)  # a longer row has a pass of its own anyway
    while sizes[-1] > least:
        sizes.append(max(least, sizes[-1] // 2))
    bases: list[Quantize] = [given.quantize]
    bases += ["int8"] if can_int8 and given.quantize == "none" else []
    for quantize in bases:
        for recompute in (False, True) if not given.recompute else (True,):
            for size in sizes:
                if (choice := Choice(size, recompute, quantize)) != given:
                    yield choice


def settings_of(choice: Choice, given: Choice) -> str:
    """The keys that lead from `given` to `choice`, as one types them."""
    words = []
    if choice.micro_batch_tokens != given.micro_batch_tokens:
        words.append(f"train.micro_batch_tokens={choice.micro_batch_tokens}")
    if choice.recompute != given.recompute:
        words.append("train.recompute=layers")
    if choice.quantize != given.quantize:
        words.append(f"model.quantize={choice.quantize}")
    return " ".join(words)


def _order(shape: Shape, work: Workload) -> Iterator[int]:
    """Passes to calibrate with: the lightest, the heaviest, then others from all over the run."""
    yield int(np.argmin(work.passes[:, 0]))
    yield heaviest(shape, work)
    count = len(work.passes)
    yield from (count * number // _MOST_PACKS for number in range(min(count, _MOST_PACKS)))


def _flops(shape: Shape, work: Workload, index: int) -> float:
    return training_flops(shape, work.at(index))


def _one_pass(network: Llama, pack: Pack) -> float:
    """Seconds of a forward and backward pass whose gradients are dropped."""
    device = network.lm_head.weight.device
    _wait(device)
    before = time.perf_counter()
    loss = pack_loss(network, pack)
    (loss / max(1, len(pack.targets))).backward()
    _wait(device)
    seconds = time.perf_counter() - before
    for parameter in network.parameters():
        parameter.grad = None
    return seconds


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(FLOPs a second, seconds a pass) of the line through measured passes; neither is ever negative."""
    flops = np.array([point[0] for point in points])
    seconds = np.array([point[1] for point in points])
    if len(points) > 1 and flops.max() > 1.5 * flops.min():
        slope, constant = np.polyfit(flops, seconds, 1)
        if slope > 0 and constant > 0:
            return 1 / float(slope), float(constant)
    return float(flops.sum() / seconds.sum()), 0.0


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
