"""From a config and its rows to the plan of the run, and to a config that fits: what train and plan both begin with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from lorafit.config.schema import Config
from lorafit.data.batch import Rows
from lorafit.data.build import build_data, row_order
from lorafit.data.packing import Pack, make_packs
from lorafit.distributed.env import ProcessEnv
from lorafit.distributed.ranks import share_cores
from lorafit.errors import RunError
from lorafit.evaluate.samples import SAMPLE_TOKENS
from lorafit.hub.client import model_folder
from lorafit.infer.continuous_batch import AT_ONCE
from lorafit.model.architecture import read_architecture
from lorafit.model.build import build, wanted_adapter
from lorafit.model.device import DTYPES, describe, pick_device, pick_dtype
from lorafit.model.llama import Llama
from lorafit.model.lora import match_targets
from lorafit.model.memory import available_bytes, resident_bytes
from lorafit.model.native import kernels
from lorafit.model.quant import check_quantize
from lorafit.observe.meters import Meter
from lorafit.observe.progress import progress
from lorafit.observe.units import memory_size
from lorafit.plan.cost_model import PassCost, Shape, num_trainable
from lorafit.plan.machine import process_seconds
from lorafit.plan.predict import (
    Choice,
    Memory,
    Plan,
    Schedule,
    Throughput,
    calibrate,
    calibration_share,
    choices,
    heaviest,
    predict_memory,
    predict_times,
    quick_rates,
    settings_of,
)
from lorafit.plan.workload import Workload, estimate_workload, heldout_passes
from lorafit.verify.proof import stop_prompts
from lorafit.verify.reload import PROBE_ROWS, Probe

LEAST_STEPS, LEAST_SECONDS = 20, 30.0  # shorter runs start at once, with a rougher plan
MOST_SHARE = 0.025  # of a run's time that its calibration may take
_ENDED_TOKENS = 32  # of an answer that ends by itself, on average
MOST_IMPORT_SECONDS = 20.0  # a process older than that did something else before


class Planner:
    """Plans one run: its rows are read, its network is not yet there. `config` is the one that fits after `fit`."""

    def __init__(self, config: Config, quiet: bool, env: ProcessEnv | None = None) -> None:
        """Read the rows; `env` says which other processes share the work and the host's memory.

        Raises a LorafitError with all that is wrong with the rows.
        """
        env = env or ProcessEnv()
        self.device = pick_device(config.model.device, env.device_index)
        share_cores(env, self.device)
        self._started, age = time.perf_counter(), process_seconds()
        self._imports = age if age < MOST_IMPORT_SECONDS else 0.0
        self.config = config
        self.base = model_folder(
            config.model.name, revision=config.model.revision, offline=config.run.offline
        )
        started = time.perf_counter()
        self.arch = read_architecture(self.base.path)
        self.training_data = build_data(config, self.base, self.arch, quiet)
        kernels()
        self._once = (
            time.perf_counter() - started
        )  # rows and compiled kernels are cached: the next run finds them
        self.order = row_order(config, self.training_data)
        self._picked = ""
        self._process = resident_bytes()
        self._ranks = env.world_size
        self._available = available_bytes(self.device)
        if self._available is not None and self.device.type == "cpu":
            self._available //= env.local_world_size
        self._beyond = 0.0  # bytes that a real pass took beyond the formula
        self._workloads: dict[int, Workload] = {}

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole run."""
        return self._workload(self.config).tokens

    def fit(self) -> Config:
        """The config to run: as it is where it fits, else as `run.too_large` says. Raises RunError."""
        if self.config.run.too_large == "try" or self._available is None:
            return self.config
        needed = self._memory(self.config)
        if needed <= self._available:
            return self.config
        problem = (
            f"training needs about {memory_size(needed)}, but only {memory_size(self._available)} can be had"
        )
        found = self._smaller()
        if found is None:
            raise RunError(
                f"{problem}, and no setting makes it fit",
                place=describe(self.device),
                hint="use a smaller model, shorter rows (data.max_length) or a lower lora.rank; "
                "run.too_large=try starts all the same",
            )
        settings, config, smaller = found
        if self.config.run.too_large == "error":
            raise RunError(
                problem,
                place=describe(self.device),
                hint=f"{settings} needs {memory_size(smaller)}; --auto picks it; run.too_large=try starts all the same",
            )
        mathematics = (
            "int8 changes the base's numbers a little"
            if config.model.quantize != self.config.model.quantize
            else "the mathematics is the same"
        )
        self._picked = f"picked {settings}, as {problem}; this needs {memory_size(smaller)}, {mathematics}"
        self.config = config
        return config

    def plan(self, network: Llama | None, *, calibrated: bool | None = None) -> Plan:
        """The plan, by one real pass where `calibrated` (by default where it costs the run next to nothing).

        Without a network there are no times. A plan of a later run leaves out what it will find cached.
        """
        config, work = self.config, self._workload(self.config)
        shape = self._shape(config)
        schedule = self._schedule(config, work)
        rates = None
        elapsed = self._imports + time.perf_counter() - self._started
        fresh = elapsed - self._once  # a process that loads the model again
        start = fresh if calibrated else elapsed
        loading_peak = Meter.memory_bytes() if network is not None else 0
        if network is not None:
            network.recompute = shape.recompute
            rates, training = quick_rates(network), self.training_data.training
            if calibrated or (calibrated is None and self._is_worth_it(shape, work, schedule, rates)):
                rates = calibrate(
                    network, shape, work, rates, lambda index: _pack(training, work.pack_of[index])
                )
        memory = self._predicted(config, rates)
        self._beyond = memory.total - self._predicted(config).total
        on_cpu = self.device.type == "cpu"
        arch = shape.arch
        return Plan(
            parameters=arch.num_parameters,
            trainable=num_trainable(shape),
            rows=len(self.training_data.training),
            steps=work.steps,
            passes=work.num_passes,
            tokens_per_epoch=work.tokens_per_epoch,
            supervised_tokens_per_epoch=work.supervised_per_epoch,
            tokens=work.tokens,
            supervised_tokens=work.supervised,
            shared_tokens=round(work.shared),
            longest_pack_tokens=int(work.at(heaviest(shape, work)).tokens),
            device=describe(self.device),
            dtype=str(pick_dtype(config.model.dtype, self.device)).removeprefix("torch."),
            choice=_choice(config),
            memory=memory,
            peak_bytes=max(memory.total, loading_peak) if on_cpu else memory.total,
            available_bytes=self._available,
            times=predict_times(shape, work, schedule, rates, start, fresh, self._ranks)
            if rates is not None
            else None,
            rates=rates,
            picked=self._picked,
        )

    def _is_worth_it(self, shape: Shape, work: Workload, schedule: Schedule, rates: Throughput) -> bool:
        """Whether calibrating takes next to nothing of the run's time and says something of use."""
        seconds = predict_times(shape, work, schedule, rates, 0.0, ranks=self._ranks).total
        share = calibration_share(shape, work)
        return work.steps >= LEAST_STEPS and seconds >= LEAST_SECONDS and share <= MOST_SHARE

    def _smaller(self) -> tuple[str, Config, int] | None:
        """The cheapest settings that fit: as words, as a config, and the memory that they need."""
        given = _choice(self.config)
        assert self._available is not None
        for choice in choices(given, self._workload(self.config), can_int8=self._can_int8()):
            config = _with(self.config, choice)
            needed = self._memory(config)
            if needed <= self._available:
                return settings_of(choice, given), config, needed
        return None

    def _can_int8(self) -> bool:
        return self.device.type in ("cpu", "cuda") and self.config.model.dtype != "float64"

    def _memory(self, config: Config) -> int:
        """Bytes that training with `config` needs, by the formula and what a real pass added to it."""
        return round(self._predicted(config).total + self._beyond)

    def _predicted(self, config: Config, rates: Throughput | None = None) -> Memory:
        """The formula's parts; of a base that is shared out over ranks a part of each layer, and one layer whole."""
        shape = self._shape(config)
        memory = predict_memory(shape, self._workload(config), self.device, self._process, rates)
        if config.distributed.strategy != "fsdp" or self._ranks == 1:
            return memory
        return replace(memory, base=memory.base * (1 / self._ranks + 1 / shape.arch.num_hidden_layers))

    def _shape(self, config: Config) -> Shape:
        arch = self.arch
        dtype = pick_dtype(config.model.dtype, self.device)
        check_quantize(config.model.quantize, self.device, dtype)
        with torch.device("meta"):
            network = Llama(arch)
        spec, _ = wanted_adapter(config)
        adapted: list[set[str]] = [set() for _ in range(arch.num_hidden_layers)]
        for name in match_targets(network, spec.targets):
            parts = name.split(".")  # model.layers.3.mlp.up_proj
            adapted[int(parts[2])].add(parts[-1])
        return Shape(
            arch=arch,
            width=DTYPES[str(dtype).removeprefix("torch.")].itemsize,
            quantize=config.model.quantize,
            adapted=tuple(frozenset(names) for names in adapted),
            rank=spec.rank,
            dropout=config.lora.dropout > 0,
            recompute=config.train.recompute == "layers",
            compiled=self.device.type == "cpu"
            and dtype in (torch.float32, torch.bfloat16)
            and arch.head_dim % 16 == 0
            and kernels() is not None,
        )

    def _workload(self, config: Config) -> Workload:
        training, train = self.training_data.training, config.train
        capacity = train.micro_batch_tokens
        if capacity not in self._workloads:
            num_steps = self.order.num_steps(train.epochs, train.max_steps)
            self._workloads[capacity] = estimate_workload(
                training.lengths,
                training.targets,
                self.order,
                num_steps,
                capacity,
                config.data.packing,
                lambda members: _pack(training, members),
            )
        return self._workloads[capacity]

    def _schedule(self, config: Config, work: Workload) -> Schedule:
        """When the loop measures and saves: every so many steps, at the end, and at most once for each best."""
        held, train = self.training_data.heldout, config.train
        passes = heldout_passes(
            held.lengths,
            held.targets,
            train.micro_batch_tokens,
            config.data.packing,
            lambda members: _pack(held, members),
        )
        every = self.order.steps_per_epoch
        measured = _times(work.steps, train.eval_every or every) if len(held) else set()
        saved = _times(work.steps, train.save_every or every) | measured
        answers: list[tuple[int, int]] = []
        if count := len(self.training_data.samples):
            speaks = config.run.samples_every
            spoken = len(_times(work.steps, speaks or every)) if speaks is not None else 0
            answers += [(count, SAMPLE_TOKENS)] * 2 + [(count, _ENDED_TOKENS)] * spoken
        proof = None
        if config.run.verify:
            probe = Probe.of(self.training_data.fixed_rows(PROBE_ROWS))
            proof = PassCost(len(probe.ids), len(probe.positions), float(probe.lengths.square().sum()))
            count, limit = stop_prompts(held.targets.tolist())
            answers += [(min(AT_ONCE, count - first), limit) for first in range(0, count, AT_ONCE)]
        return Schedule(len(measured) + bool(measured), passes, len(saved), answers, proof)


def plan_run(config: Config, *, quiet: bool = False) -> Plan:
    """The plan of a run that is not started: rows are read, the network is loaded, one real pass is measured.

    Raises a LorafitError with all that is wrong, also that memory is short and what would fit.
    """
    planner = Planner(config, quiet)
    while True:
        config = planner.fit()
        with progress("loading the model", quiet=quiet) as advance:
            built = build(config, planner.base.path, planner.device, advance)
        try:
            with progress("measuring one pass", quiet=quiet):
                plan = planner.plan(built.network, calibrated=True)
        except torch.OutOfMemoryError:
            raise RunError(
                "out of memory in the pass that was to be measured",
                place=describe(built.device),
                hint=f"set train.micro_batch_tokens below {config.train.micro_batch_tokens}",
            ) from None
        if plan.fits or config.run.too_large == "try":
            return plan
        del (
            built
        )  # the real pass took more than the formula said: refused now, or something smaller is picked


def _pack(rows: Rows, members: Sequence[int]) -> Pack:
    """The rows at `members` as one pack."""
    found = [rows.row(index) for index in members]
    return make_packs(found, sum(len(ids) for ids, _ in found))[0]


def _choice(config: Config) -> Choice:
    train = config.train
    return Choice(train.micro_batch_tokens, train.recompute == "layers", config.model.quantize)


def _with(config: Config, choice: Choice) -> Config:
    """`config` with the settings of `choice`."""
    train = {
        "micro_batch_tokens": choice.micro_batch_tokens,
        "recompute": "layers" if choice.recompute else "none",
    }
    return config.model_copy(
        update={
            "train": config.train.model_copy(update=train),
            "model": config.model.model_copy(update={"quantize": choice.quantize}),
        }
    )


def _times(num_steps: int, every: int) -> set[int]:
    """The steps after which something happens that happens every so many steps and at the end."""
    return {*range(every, num_steps + 1, every), num_steps}
