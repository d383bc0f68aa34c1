"""What a run needs before it starts: tokens, steps, memory and time, and which settings fit where it does not.

The cost model (plan/cost_model.py) predicts memory, and one real pass over the heaviest pack corrects it. Time is
seconds per token times tokens. Nothing here knows a config or a run directory: plan/planner.py joins them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from lorafit.model.memory import MOST_KERNELS, SPARE_BYTES
from lorafit.model.native import blocks
from lorafit.plan.cost_model import (
    Shape,
    base_bytes,
    copied_bytes,
    num_trainable,
    saved_bytes,
    streamed_bytes,
    working_bytes,
)
from lorafit.plan.workload import Workload

_STEP_SECONDS = 6e-3  # per optimizer step: AdamW's calls, clipping, packing, recording
ENDS_SECONDS = 1.0  # making the run directory, digests, exporting the adapter, leaving the process
_OPTIMIZER_SECONDS = 8e-9  # AdamW and clipping, per parameter of the adapter
_SAVE_SECONDS, _SAVED_BYTES_PER_SECOND = 0.05, 2.5e8  # a checkpoint is synced, then read back
_PROOF_PASSES = 4  # base and tuned, trained and loaded
BUS_BYTES_PER_SECOND = (
    12e9  # pinned memory over PCIe 3.0 x 16, as a T4 has it; newer ones are twice as fast or more
)
# What torch loads and allocates once at the first products. On CUDA the context itself is there before the free memory
# is read (Machine.read).
_LIBRARIES_BYTES = 80 * 10**6
# On a CPU, torch's library (oneDNN) compiles small 16-bit products anew for every number of rows and keeps some of them
# (model/memory.py). Measured: about four for a pass of a new size.
_ONE_KERNEL = 14 * 10**5
_KERNEL_BYTES, _MOST_KERNEL_BYTES = 4 * _ONE_KERNEL, MOST_KERNELS * _ONE_KERNEL


@dataclass(frozen=True, slots=True)
class Memory:
    """Predicted bytes at the peak of training, part by part.

    `rest` is what the real pass needed beyond the other parts (negative: less). Without a real pass it is a constant.
    """

    process: float
    base: float
    adapter: float  # parameters, gradients, both of AdamW's moments
    activations: float  # what the heaviest pack keeps for its backward pass
    working: float  # temporaries: a layer's gradients, the chunk of logits
    kernels: float  # products compiled for the sizes of the passes, kept by torch's CPU library
    spare: float  # freed blocks that are kept for passes of other sizes
    rest: float

    @property
    def total(self) -> int:
        """The sum of all parts."""
        total: float = sum(asdict(self).values())
        return round(total)


@dataclass(frozen=True, slots=True)
class Times:
    """Predicted seconds of a whole run, part by part."""

    start: float  # and the end
    steps: float
    measuring: float
    saving: float
    answering: float  # prompts, also those of the proof; at most
    asking: float  # passes over trained and held-out rows, which show what was learned
    proving: float  # a new process that loads the run, and the passes that it computes

    @property
    def total(self) -> float:
        """The sum of all parts."""
        total: float = sum(asdict(self).values())
        return total


@dataclass(frozen=True, slots=True)
class Throughput:
    """How fast this machine computes.

    `seconds_per_token` are of a forward and backward pass, `token_seconds` of one generated token. `measured` is
    whether real passes were timed; then `peak_bytes` is the peak memory of the heaviest one. `seconds` is what the
    measurement took.
    """

    seconds_per_token: float
    token_seconds: float
    measured: bool
    seconds: float
    peak_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Offloaded:
    """What `model.offload=layers` costs: the layers in pinned host memory, and what a step copies, in bytes.

    `seconds_per_step` is the time of these copies at BUS_BYTES_PER_SECOND. A step takes at least that.
    """

    host_bytes: float
    bytes_per_step: float
    seconds_per_step: float

    @classmethod
    def of(cls, shape: Shape, work: Workload) -> Offloaded | None:
        """That of a workload; None where all layers are on the device."""
        if not shape.offload:
            return None
        num_bytes = copied_bytes(shape) * work.num_passes / work.steps
        return cls(sum(streamed_bytes(shape)), num_bytes, num_bytes / BUS_BYTES_PER_SECOND)


@dataclass(frozen=True, slots=True)
class Schedule:
    """How often a run measures and saves, and what it generates and proves.

    `heldout_tokens` are of one measurement. `answers` are batches of prompts: their rows, and the most tokens of one
    answer. `asked_tokens` are of the rows that base and adapter read at the end. `proof_tokens` is the pass whose
    logits the proof compares, None without a proof.
    """

    measurements: int
    heldout_tokens: float
    saves: int
    answers: Sequence[tuple[int, int]]
    asked_tokens: float
    proof_tokens: int | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run needs. Tokens and steps are exact; memory and time are predicted.

    `shared_tokens` estimates the tokens of prefixes that rows of a pass share; each is computed once per pass, but for
    the mixers of a hybrid (`mixes_by_row`), which have states that end with the row.
    `peak_bytes` is the peak of the process's resident memory (on CUDA the device's), loading included.
    `available_bytes` is None where unknown. `choice` are the settings that decide the memory. `picked` names those
    that were chosen: in place of `auto`, and to make the run fit. `refit_steps` are at most those of a second phase, on
    all rows (0: there is none); times count them, tokens and steps do not.
    """

    parameters: int
    trainable: int
    rows: int
    steps: int
    epochs: float
    refit_steps: int
    passes: int
    tokens_per_epoch: int
    supervised_tokens_per_epoch: int
    tokens: int
    supervised_tokens: int
    shared_tokens: int
    mixes_by_row: bool
    longest_pack_tokens: int
    device: str
    dtype: str
    choice: Mapping[str, Any]
    memory: Memory
    peak_bytes: int
    available_bytes: int | None
    times: Times | None
    rates: Throughput | None
    picked: str = ""
    offloaded: Offloaded | None = None

    @property
    def fits(self) -> bool:
        """Whether memory is enough; True where the available memory is unknown."""
        return self.available_bytes is None or self.memory.total <= self.available_bytes

    def as_dict(self) -> dict[str, Any]:
        """As JSON values, with the totals; bytes and seconds."""
        times = {**asdict(self.times), "total": self.times.total} if self.times else None
        memory = {**asdict(self.memory), "total": self.memory.total}
        return {**asdict(self), "memory": memory, "times": times, "fits": self.fits}


def heaviest(shape: Shape, work: Workload) -> int:
    """Index of the pass that needs the most memory."""
    computed = work.passes[:, 0] + (work.passes[:, 2] if shape.on_gpu else 0.0)
    order = np.lexsort((-work.passes[:, 1], -computed))
    supervised = work.passes[order, 1]
    most = np.maximum.accumulate(supervised)
    # memory grows with both numbers: only a pass with more supervised tokens than every longer one can be it
    front = order[np.concatenate(([True], supervised[1:] > most[:-1]))]

    def num_bytes(index: int) -> float:
        return saved_bytes(shape, work.at(index)) + working_bytes(shape, work.at(index))

    return max(map(int, front), key=num_bytes)


def predict_memory(
    shape: Shape, work: Workload, device: torch.device, process: float, measured_bytes: int | None = None
) -> Memory:
    """The parts of the peak; `process` is what was resident before the network was loaded.

    `measured_bytes`, the measured peak of the heaviest pack, replaces the sum of its parts.
    """
    heaviest_pass = work.at(heaviest(shape, work))
    trainable = num_trainable(shape) * _adapter_width(shape)
    on_cpu = device.type == "cpu"
    kernel_bytes = _KERNEL_BYTES if on_cpu and (shape.width == 2 or shape.quantize != "none") else 0
    sizes = len(np.unique(work.passes[:, :2], axis=0)) * work.weight
    activations = saved_bytes(shape, heaviest_pass)
    several = on_cpu and sizes > 1 and blocks() is not None
    memory = Memory(
        process=process if on_cpu else 0,
        base=base_bytes(shape),
        adapter=trainable * (4 if work.most_in_a_step > 1 else 3),
        activations=activations,
        working=working_bytes(shape, heaviest_pass),
        kernels=min(kernel_bytes * sizes, _MOST_KERNEL_BYTES),
        spare=min(SPARE_BYTES, activations) if several else 0,
        rest=_LIBRARIES_BYTES,
    )
    if measured_bytes is None:
        return memory
    # the measured pass had no optimizer step: of the adapter only the parameters, of the kernels those of two sizes
    expected = memory.total - memory.rest - memory.adapter + trainable - memory.kernels + 2 * kernel_bytes
    expected -= memory.spare
    return replace(memory, rest=measured_bytes + (0 if on_cpu else _LIBRARIES_BYTES) - expected)


def predict_times(
    shape: Shape,
    work: Workload,
    schedule: Schedule,
    rates: Throughput,
    start: float,
    new_process: float = 0.0,
    ranks: int = 1,
) -> Times:
    """The parts of the run's wall time.

    `start` is the seconds until the first step, `new_process` those that a new process needs to load the run. Each
    of `ranks` is taken to be as fast as this process; communication is not counted.
    """
    trainable = num_trainable(shape)
    # a forward pass makes one product per weight, training one more, and with recompute a third
    forward = rates.seconds_per_token / (3 if shape.recompute else 2)
    one_save = save_seconds(trainable * _adapter_width(shape))
    computing = work.computed_tokens * rates.seconds_per_token / ranks
    if (offloaded := Offloaded.of(shape, work)) is not None and not rates.measured:
        computing = max(computing, work.steps * offloaded.seconds_per_step)
    proving = 0.0
    if schedule.proof_tokens is not None:
        proving = new_process + _PROOF_PASSES * schedule.proof_tokens * forward
    return Times(
        start=start + ENDS_SECONDS,
        steps=computing + work.steps * (_STEP_SECONDS + trainable * _OPTIMIZER_SECONDS),
        measuring=schedule.measurements * schedule.heldout_tokens * forward / ranks,
        saving=schedule.saves * one_save,
        answering=sum(
            tokens * (rates.token_seconds + (rows - 1) * forward) for rows, tokens in schedule.answers
        ),
        asking=2 * schedule.asked_tokens * forward,
        proving=proving,
    )


def save_seconds(adapter_bytes: int) -> float:
    """Seconds for a checkpoint of an adapter of this size, with AdamW's two moments."""
    return _SAVE_SECONDS + adapter_bytes * 3 / _SAVED_BYTES_PER_SECOND


def _adapter_width(shape: Shape) -> int:
    """Bytes per parameter of the adapter."""
    return 4 if shape.width < 8 else 8
