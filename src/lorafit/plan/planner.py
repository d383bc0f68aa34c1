"""From a config, its rows and a machine to a config that fits, and to the plan of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import product
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch

from lorafit.config.auto import picked, without_auto
from lorafit.config.fields import budget_seconds, next_clock_time
from lorafit.config.schema import Config
from lorafit.data.build import TrainingData, build_data, row_order, sizes_of
from lorafit.data.packing import Packer
from lorafit.data.row_order import RowOrder
from lorafit.distributed.env import ProcessEnv, command
from lorafit.errors import ConfigError, RunError
from lorafit.evaluate.learned import tokens_asked
from lorafit.evaluate.samples import SAMPLE_TOKENS, Prompt, prompts_of
from lorafit.hub.client import ModelFolder
from lorafit.infer.continuous_batch import AT_ONCE
from lorafit.infer.model import check_readable
from lorafit.model.architecture import Architecture, read_architecture
from lorafit.model.attention import way_on_device
from lorafit.model.build import base_folder, build, check_initial, wanted_adapter
from lorafit.model.device import describe, pick_device, pick_dtype
from lorafit.model.dtypes import dtype_name
from lorafit.model.llama import Llama
from lorafit.model.lora import layer_number, match_targets, with_exceptions
from lorafit.model.memory import is_out_of_memory
from lorafit.model.native import blocks, kernels
from lorafit.model.offload import check_offload
from lorafit.model.quant import check_quantize
from lorafit.model.tables import EMBEDDING, HEAD
from lorafit.observe.meters import Meter
from lorafit.observe.progress import progress
from lorafit.observe.units import memory_size
from lorafit.plan.cadence import Cadence
from lorafit.plan.calibrate import calibrate, quick_rates
from lorafit.plan.cost_model import Shape, num_trainable, streamed_bytes
from lorafit.plan.machine import Machine, process_seconds
from lorafit.plan.predict import (
    Memory,
    Offloaded,
    Plan,
    Schedule,
    Throughput,
    Times,
    heaviest,
    predict_memory,
    predict_times,
)
from lorafit.plan.workload import Workload, estimate_workload, heldout_tokens, pack_of_rows
from lorafit.verify.proof import stop_prompts
from lorafit.verify.reload import PROBE_ROWS, Probe

LEAST_STEPS, LEAST_SECONDS = 20, 30.0  # shorter runs start at once, with a rougher plan
_MIN_MICRO_BATCH = 128  # smaller passes save little memory and cost time
MOST_SHARE = 0.025  # of a run's time that its calibration may take
_ENDED_TOKENS = 32  # of an answer that ends with a stop token, on average
MOST_IMPORT_SECONDS = 20.0  # an older process did something else before


@dataclass(frozen=True, eq=False)
class RunInputs:
    """What a run reads: the folder and architecture of its base model, its rows as tokens, and their order.

    `config` is what was given, with a number for each `auto`; `picked` names these. `base_note` is what `check_initial`
    returns. `started` is when reading began (time.perf_counter), `read_seconds` what it took. The next run finds rows
    and compiled kernels in the cache.
    """

    config: Config
    picked: str
    base: ModelFolder
    base_note: str
    arch: Architecture
    training_data: TrainingData
    prompts: Sequence[Prompt]
    order: RowOrder
    started: float
    read_seconds: float
    _workloads: dict[tuple[Packer, int], Workload] = field(default_factory=dict)

    @classmethod
    def read(cls, config: Config, quiet: bool) -> RunInputs:
        """Read and tokenise the rows. Raises a LorafitError with all that is wrong with them."""
        started = time.perf_counter()
        base = base_folder(config, validate=check_readable)
        arch = read_architecture(base.path)
        base_note = check_initial(config, base)
        training_data = build_data(config, base, arch, quiet)
        if pick_device(config.model.device).type == "cpu":
            with progress("compiling the CPU kernels, once on this machine", quiet=quiet):
                kernels()
                blocks()
        given, config = config, without_auto(config, sizes_of(training_data, arch.num_parameters))
        order = row_order(config, training_data)
        own = Path(config.run.prompts).expanduser() if config.run.prompts else None
        return cls(
            config,
            picked(given, config),
            base,
            base_note,
            arch,
            training_data,
            prompts_of(training_data.samples, own),
            order,
            started,
            time.perf_counter() - started,
        )

    def elapsed(self) -> float:
        """Seconds since the start of the run: of its process, where that did nothing else before."""
        elapsed, age = time.perf_counter() - self.started, process_seconds()
        is_own = command["is_one_run"] or age - elapsed < MOST_IMPORT_SECONDS
        return max(age, elapsed) if is_own else elapsed

    def num_steps(self, config: Config) -> int:
        """Optimizer steps of the run."""
        return self.order.num_steps(config.train.epochs, config.train.max_steps)

    def workload(self, config: Config) -> Workload:
        """What the run computes."""
        packer = _packer(config)
        key = packer, self.num_steps(config)
        if key not in self._workloads:
            self._workloads[key] = estimate_workload(self.training_data.training, self.order, key[1], packer)
        return self._workloads[key]


class Fit(NamedTuple):
    """The final config of a run, and a note about the settings that were picked (empty: none)."""

    config: Config
    note: str


def fit(config: Config, data: RunInputs, machine: Machine, beyond: float = 0.0) -> Fit:
    """The config to run: as it is where it fits, else as `run.too_large` says. Raises RunError.

    `beyond` are bytes that a real pass needed in addition to the prediction.
    """
    available = machine.available_bytes
    if config.run.too_large == "try" or available is None:
        return Fit(config, "")

    def needed(candidate: Config) -> int:
        return round(_memory(candidate, data, machine).total + beyond)

    def missing(candidate: Config) -> str:
        if (num_bytes := needed(candidate)) > available:
            numbers = f"about {memory_size(num_bytes)}, but only {memory_size(available)}"
            return f"training needs {numbers} are available"
        on_host, there = _host_bytes(candidate, data, machine), machine.host_bytes
        if there is None or on_host <= there:
            return ""
        numbers = f"{memory_size(on_host)} in the host's memory, but only {memory_size(there)}"
        return f"model.offload=layers keeps {numbers} are available there"

    if not (problem := missing(config)):
        return Fit(config, "")
    for candidate in candidates(config, data.workload(config).longest_row):
        try:
            if not missing(candidate):
                break
        except ConfigError:  # the device or the number type has no int8, or cannot offload
            continue
    else:
        raise RunError(
            f"{problem}, and no setting makes it fit",
            place=describe(machine.device),
            hint="use a smaller model, shorter rows (data.max_length) or a lower lora.rank; "
            "run.too_large=try starts in spite of it",
        )
    settings, num_bytes = settings_of(candidate, config), needed(candidate)
    if config.run.too_large == "error":
        raise RunError(
            problem,
            place=describe(machine.device),
            hint=f"{settings} needs {memory_size(num_bytes)}; --auto picks it; "
            "run.too_large=try starts in spite of it",
        )
    changed = candidate.model.quantize != config.model.quantize
    effect = "int8 changes the base's numbers a little" if changed else "the result does not change"
    return Fit(candidate, f"picked {settings}, as {problem}; this needs {memory_size(num_bytes)}, {effect}")


def candidates(config: Config, longest_row: int) -> Iterator[Config]:
    """`config` itself, then with settings that need less memory, the cheapest first.

    Smaller passes cost almost nothing, recomputing a third of the time, int8 changes numbers. Layers in the host's
    memory cost the most: each pass copies all of them.
    """
    train, model = config.train, config.model
    sizes = [train.micro_batch_tokens]
    least = max(longest_row, _MIN_MICRO_BATCH)  # a longer row gets a pass of its own
    while sizes[-1] > least:
        sizes.append(max(least, sizes[-1] // 2))
    bases = ["none", "int8"] if model.quantize == "none" else [model.quantize]
    offloads, recomputes = (
        dict.fromkeys([model.offload, "layers"]),
        dict.fromkeys([train.recompute, "layers"]),
    )
    for offload, quantize, recompute, size in product(offloads, bases, recomputes, sizes):
        changed = train.model_copy(update={"micro_batch_tokens": size, "recompute": recompute})
        base = model.model_copy(update={"quantize": quantize, "offload": offload})
        yield config.model_copy(update={"train": changed, "model": base})


def settings_of(candidate: Config, config: Config) -> str:
    """The settings that lead from `config` to `candidate`, as on the command line."""
    getters = {
        key: attrgetter(key)
        for key in ("train.micro_batch_tokens", "train.recompute", "model.quantize", "model.offload")
    }
    pairs = ((key, get(candidate)) for key, get in getters.items() if get(candidate) != get(config))
    return " ".join(f"{key}={value}" for key, value in pairs)


def make_plan(
    fitted: Fit,
    data: RunInputs,
    machine: Machine,
    network: Llama | None,
    *,
    calibrated: bool | None = None,
    rates: Throughput | None = None,
) -> Plan:
    """The plan of a fitted config, by real passes where `calibrated` (by default where they cost the run little).

    Without a network there are no times. `rates` are those that were measured before. The plan of a later run leaves
    out what it will find in the cache. With a time budget it is the plan of about as many steps as fit.
    """
    config, work = fitted.config, data.workload(fitted.config)
    shape = _shape(config, data.arch, machine.device)
    schedule = _schedule(config, data, work)
    refit_steps = _refit_steps(config, data, work)
    elapsed = data.elapsed()
    new_process = elapsed - data.read_seconds  # one that loads the model again
    start = new_process if calibrated else elapsed
    loading_peak = Meter.memory_bytes() if network is not None else 0
    times = None
    if network is not None and rates is None:
        network.recompute = shape.recompute
        rates = quick_rates(network)
        index = heaviest(shape, work)
        if calibrated is None:  # two passes over the heaviest pack, where they are a small part of a long run
            seconds = predict_times(shape, work, schedule, rates, 0.0, ranks=machine.ranks).total
            part = 2 * work.at(index).tokens / max(1.0, work.computed_tokens)
            calibrated = work.steps >= LEAST_STEPS and seconds >= LEAST_SECONDS and part <= MOST_SHARE
        if calibrated:
            training = data.training_data.training
            rates = calibrate(
                network, work, index, rates, lambda number: pack_of_rows(training, work.pack_of[number])
            )
    if rates is not None:
        times = predict_times(shape, work, schedule, rates, start, new_process, machine.ranks)
        times = replace(times, steps=times.steps * (1 + refit_steps / work.steps))
        if config.train.budget is not None:
            within = _within(config, times, work.steps)
            return make_plan(
                Fit(within, fitted.note), data, machine, network, calibrated=calibrated, rates=rates
            )
    memory = _memory(config, data, machine, rates.peak_bytes if rates is not None else None)
    on_cpu = machine.device.type == "cpu"
    return Plan(
        parameters=data.arch.num_parameters,
        trainable=num_trainable(shape),
        rows=len(data.training_data.training),
        steps=work.steps,
        epochs=data.order.epoch_at(work.steps),
        refit_steps=refit_steps,
        passes=work.num_passes,
        tokens_per_epoch=work.tokens_per_epoch,
        supervised_tokens_per_epoch=work.supervised_per_epoch,
        tokens=work.tokens,
        supervised_tokens=work.supervised,
        shared_tokens=round(work.shared),
        mixes_by_row=bool(data.arch.mixers),
        longest_pack_tokens=int(work.at(heaviest(shape, work)).tokens),
        device=describe(machine.device),
        dtype=dtype_name(pick_dtype(config.model.dtype, machine.device, data.arch.family.fits_float16)),
        choice={
            "micro_batch_tokens": config.train.micro_batch_tokens,
            "recompute": shape.recompute,
            "quantize": shape.quantize,
            "offload": config.model.offload,
        },
        memory=memory,
        peak_bytes=max(memory.total, loading_peak) if on_cpu else memory.total,
        available_bytes=machine.available_bytes,
        times=times,
        rates=rates,
        picked="; ".join(filter(None, [data.picked, fitted.note])),
        offloaded=Offloaded.of(shape, work),
    )


def _within(config: Config, times: Times, steps: int) -> Config:
    """`config` with about as many steps as fit into its time budget; `times` are those of `steps` steps."""
    text, now = config.train.budget, datetime.now()
    assert text is not None
    seconds = budget_seconds(text) or (next_clock_time(text, now) - now).total_seconds()
    fitting = round((seconds - times.total + times.steps) / (times.steps / steps))
    train = config.train.model_copy(update={"max_steps": max(1, fitting), "budget": None})
    return config.model_copy(update={"train": train})


def plan_run(config: Config, *, quiet: bool = False) -> Plan:
    """The plan of a run that is not started: rows are read, the network is loaded, real passes are measured.

    Raises a LorafitError with all that is wrong, also where memory is short, with the settings that fit.
    """
    device = pick_device(config.model.device)
    data = RunInputs.read(config, quiet)
    config = data.config
    machine = Machine.read(device, ProcessEnv())
    note, beyond = "", 0.0
    while True:
        fitted = fit(config, data, machine, beyond)
        config, note = fitted.config, fitted.note or note
        with progress("loading the model", quiet=quiet) as advance:
            tokens = data.training_data.tokenizer.trained
            built = build(config, data.base.path, device, advance, tokens=tokens)
        try:
            with progress("measuring one pass", quiet=quiet):
                plan = make_plan(Fit(config, note), data, machine, built.network, calibrated=True)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(
                "out of memory in the pass to be measured",
                place=describe(device),
                hint=f"set train.micro_batch_tokens below {config.train.micro_batch_tokens}",
            ) from None
        if plan.fits or config.run.too_large == "try":
            return plan
        del built  # the real pass needed more than predicted: the next round raises or picks smaller settings
        beyond = plan.memory.total - _memory(config, data, machine).total


def _memory(config: Config, data: RunInputs, machine: Machine, measured_bytes: int | None = None) -> Memory:
    """The predicted parts. Of a sharded base a rank holds its part of each layer, and one layer whole."""
    shape = _shape(config, data.arch, machine.device)
    work = data.workload(config)
    memory = predict_memory(shape, work, machine.device, machine.resident_bytes, measured_bytes)
    if config.distributed.strategy != "fsdp" or machine.ranks == 1:
        return memory
    return replace(memory, base=memory.base * (1 / machine.ranks + 1 / data.arch.num_hidden_layers))


def _host_bytes(config: Config, data: RunInputs, machine: Machine) -> float:
    """Bytes of the layers that stay in the host's memory."""
    if config.model.offload == "none":
        return 0.0
    return sum(streamed_bytes(_shape(config, data.arch, machine.device)))


def _shape(config: Config, arch: Architecture, device: torch.device) -> Shape:
    dtype = pick_dtype(config.model.dtype, device, arch.family.fits_float16)
    check_quantize(config.model.quantize, device, dtype)
    check_offload(config.model.offload, device, config.distributed.strategy)
    with torch.device("meta"):
        network = Llama(arch)
    spec, _ = wanted_adapter(config)
    adapted: list[set[str]] = [set() for _ in range(arch.num_hidden_layers)]
    names = match_targets(network, spec.targets)
    spec = with_exceptions(network, spec, names)
    layers = [dict(arch.linears(layer)) for layer in range(arch.num_hidden_layers)]
    sizes = [sum(layers[layer_number(name)][name.rpartition(".")[2]]) for name in names]
    parameters = sum(spec.of(name).rank * size for name, size in zip(names, sizes, strict=True))
    for name in names:
        adapted[layer_number(name)].add(name.rpartition(".")[2])
    has_kernel = (
        device.type == "cpu"
        and dtype in (torch.float32, torch.bfloat16)
        and arch.head_dim % 16 == 0
        and kernels() is not None
    )
    return Shape(
        arch=arch,
        width=dtype.itemsize,
        quantize=config.model.quantize,
        adapted=tuple(frozenset(names) for names in adapted),
        rank=parameters / sum(sizes),
        tables=_tables(config, arch),
        variant=spec.variant,
        dropout=config.lora.dropout > 0,
        recompute=config.train.recompute == "layers",
        attention="kernel" if has_kernel else way_on_device(device, dtype, arch.head_dim),
        offload=config.model.offload == "layers",
    )


def _tables(config: Config, arch: Architecture) -> tuple[int, int]:
    """Trained numbers of embedding and head, and numbers of the copies beside them (model/tables.py)."""
    names = (EMBEDDING,) if arch.tie_word_embeddings else (EMBEDDING, HEAD)
    lora, whole = config.lora, arch.vocab_size + len(config.lora.tokens)
    is_tied = arch.tie_word_embeddings
    trained = [whole * (name in lora.save_modules or (is_tied and bool(lora.save_modules))) for name in names]
    rows = sum(number or len(lora.tokens) for number in trained)
    copies = sum(whole for number in trained if number or lora.tokens) + sum(trained)
    return rows * arch.hidden_size, copies * arch.hidden_size


def _packer(config: Config) -> Packer:
    """How the run packs rows."""
    train = config.train
    return Packer(train.micro_batch_tokens, config.data.packing, may_share=not train.neftune)


def _refit_steps(config: Config, data: RunInputs, work: Workload) -> int:
    """The steps of the second phase at most, on all rows; 0 where there is none."""
    if not config.train.refit or not len(data.training_data.heldout):
        return 0
    everything = row_order(config, data.training_data.with_all_rows())
    return max(1, round(work.steps * everything.steps_per_epoch / data.order.steps_per_epoch))


def _schedule(config: Config, data: RunInputs, work: Workload) -> Schedule:
    """When the loop measures and saves; a best measurement is saved too, so each may add a checkpoint."""
    rows = data.training_data
    due = Cadence.of(config, work.steps, data.order.steps_per_epoch).times()
    measurements = sum(each.measure for each in due) if len(rows.heldout) else 0
    saves = sum(each.save or (each.measure and measurements > 0) for each in due)
    answers: list[tuple[int, int]] = []
    if count := len(data.prompts):
        answers += [(count, SAMPLE_TOKENS)] * 2 + [(count, _ENDED_TOKENS)] * sum(each.sample for each in due)
    proof_tokens = None
    if config.run.verify:
        proof_tokens = len(Probe.of(rows.fixed_rows(PROBE_ROWS)).ids)
        count, limit = stop_prompts(rows.heldout.targets.tolist())
        answers += [(min(AT_ONCE, count - first), limit) for first in range(0, count, AT_ONCE)]
    return Schedule(
        measurements=measurements + bool(measurements),  # the base is measured once
        heldout_tokens=heldout_tokens(rows.heldout, _packer(config)),
        saves=saves,
        answers=answers,
        asked_tokens=tokens_asked(rows) if config.train.method == "sft" else 0.0,
        proof_tokens=proof_tokens,
    )
