"""The story of a run: prepare it, train it from the start or from a checkpoint, and put the result on disk."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from lorafit.check.disk import checkpoint_bytes
from lorafit.config.load import with_absolute_paths
from lorafit.config.schema import Config, keys_that_change_results, with_defaults
from lorafit.data.batch import RankShare
from lorafit.data.packing import Packer
from lorafit.distributed.env import ProcessEnv
from lorafit.distributed.parallel import Engine, ReplicatedEngine
from lorafit.distributed.ranks import Ranks, check_strategy, init_process_group
from lorafit.distributed.watchdog import Heartbeat
from lorafit.errors import RunError
from lorafit.evaluate.samples import SampleGenerator
from lorafit.infer.model import Model
from lorafit.model.adapter_file import adapter_tensors
from lorafit.model.architecture import attention_cost
from lorafit.model.build import BaseModelCache
from lorafit.model.compile import enable_compile
from lorafit.model.device import describe, deterministic_kernels
from lorafit.model.dtypes import dtype_name
from lorafit.model.fused_layer import start_kernels
from lorafit.model.memory import is_out_of_memory
from lorafit.model.native import missing
from lorafit.observe.curve_monitor import CurveMonitor, diagnosing
from lorafit.observe.events import Message, Observer, Progress, RunStarted, fan_out
from lorafit.observe.metrics_file import Record, read_metrics, truncate_after
from lorafit.observe.run_summary import RunState
from lorafit.observe.terminal import Terminal
from lorafit.observe.trackers import tracker
from lorafit.observe.units import count
from lorafit.observe.visits import VisitLog, truncate_visits
from lorafit.plan.cadence import Cadence
from lorafit.plan.planner import make_plan
from lorafit.plan.predict import Plan
from lorafit.plan.table import short_lines
from lorafit.redact import shell
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import read_facts, sha256_file, verify_folder
from lorafit.training import loop, pace, refit
from lorafit.training.checkpoint import (
    FILES,
    TrainState,
    changes,
    differences,
    load_checkpoint,
    refuse_changes,
    seed_random,
)
from lorafit.training.checkpoint_writer import wait_for_left
from lorafit.training.finish import finish, leave_report, observe_early_end
from lorafit.training.loss_scale import LossScale
from lorafit.training.neutral import neutral_of
from lorafit.training.objective import with_reference
from lorafit.training.optim import make_optimizer
from lorafit.training.pace import Budget
from lorafit.training.resume import Resumption, find_run_of_launch
from lorafit.training.setup import (
    Prepared,
    announce,
    environment,
    is_sharded,
    machine_facts,
    prepare,
    write_origin,
)
from lorafit.training.signals import Requests, outside_steps, with_way_back
from lorafit.training.stream_cache import keep_streams
from lorafit.verify.proof import tensor_digests


@dataclass(frozen=True, slots=True)
class Result:
    """What a run came to."""

    path: Path
    adapter: Path
    finished: bool
    step: int
    loss: float | None
    heldout_loss: float | None
    base_loss: float | None
    proven: bool | None = None  # None without a proof


_only_one = threading.Lock()


@contextmanager
def _only_run() -> Iterator[None]:
    """Let no other thread of this process train in the block: random generators belong to the process.

    Raises RunError where one does.
    """
    if not _only_one.acquire(blocking=False):
        hint = "train one run after the other, or each in a process of its own"
        raise RunError("this process is training another run", hint=hint)
    try:
        yield
    finally:
        _only_one.release()


def start_run(config: Config, *, quiet: bool = False, base: BaseModelCache | None = None) -> Result:
    """Train a new run. Raises a LorafitError before the first step where config, model or data are wrong.

    `base` keeps the base model loaded for the caller's next run.
    """
    env = ProcessEnv.read()
    check_strategy(config.distributed.strategy, config.model.quantize, env)
    deterministic = deterministic_kernels(config.train.deterministic)
    silent = terminal_or_silent(env, quiet)
    with _only_run(), deterministic, init_process_group(env) as ranks, outside_steps(silent):
        if ranks.broadcast_from_rank0("begun", str, lambda: find_run_of_launch(env, config.run.output)):
            assert config.run.output is not None
            return _resume(ranks, config.run.output, (), False, quiet, base)
        run = RunDirectory(
            ranks.broadcast_from_rank0(
                "output", Path, lambda: RunDirectory.new(config.run.output, config.model.name).path
            )
        )
        made_here = config.run.output is None
        config = config.model_copy(update={"run": config.run.model_copy(update={"output": str(run.path)})})
        with run.removed_on_failure() if made_here else nullcontext():
            prepared = prepare(config, ranks, quiet, base)
        if not ranks.is_main:
            return run_training(prepared, run, ranks, step=None, notes=[], quiet=quiet)
        run.create(checkpoint_bytes(prepared.built.network))
        with run.locked():
            run.check_vacant()  # another process may have used the folder while this one read the rows
            write_origin(run, prepared)
            run.write_json(run.env_file, environment(env))
            run.write_config(prepared.config)  # last: this file makes the folder a run
            with with_way_back(run):
                return run_training(prepared, run, ranks, step=None, notes=[], quiet=quiet)


def resume_run(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    accept_changes: bool = False,
    quiet: bool = False,
    base: BaseModelCache | None = None,
) -> Result:
    """Resume a run from its newest checkpoint that verifies; a finished run stays as it is.

    `overrides` (`section.key=value`) change keys of the run from here on. Raises RunError where anything that
    changes results differs from the checkpoint, unless `accept_changes`.
    """
    env = ProcessEnv.read()
    with _only_run(), init_process_group(env) as ranks, outside_steps(terminal_or_silent(env, quiet)):
        return _resume(ranks, path, overrides, accept_changes, quiet, base)


def _resume(
    ranks: Ranks,
    path: str | Path,
    overrides: Sequence[str],
    accept_changes: bool,
    quiet: bool,
    base: BaseModelCache | None,
) -> Result:
    """`resume_run` in a process group. Only the first rank needs the run directory."""
    run = RunDirectory.open(path) if ranks.is_main else RunDirectory(Path(path).expanduser())
    wait_for_left()
    with run.locked() if ranks.is_main else nullcontext(), with_way_back(run):
        resumption = ranks.broadcast_from_rank0(
            "resumption", Resumption, lambda: Resumption.of(run, overrides)
        )
        config, step = resumption.config, resumption.step
        check_strategy(config.distributed.strategy, config.model.quantize, ranks.env)
        if resumption.finished is not None:
            if overrides:
                raise RunError(
                    f"`{path}` is complete: no setting changes it any more",
                    hint=f"start a new run from it with {shell(f'lora.init_from={run.adapter}')}",
                )
            edits = _edits(run, config, accept_changes) if ranks.is_main else []
            observe, state = terminal_or_silent(ranks.env, quiet), resumption.finished
            for edit in edits:
                observe(Message(edit, "warning"))
            observe(
                Message(f"`{path}` {RunState.of(run)} after {count(state.step, 'step')}; nothing was changed")
            )
            if ranks.is_main and not run.report_file.exists():  # killed between the end and the report
                leave_report(run, observe)
            losses = (state.last_loss, state.best_loss, state.base_loss)
            return Result(run.path, run.adapter, True, state.step, *losses)
        with deterministic_kernels(config.train.deterministic):
            prepared = prepare(config, ranks, quiet, base, resumed=True)
            notes = _reconcile(run, prepared, resumption, accept_changes) if ranks.is_main else []
            return run_training(prepared, run, ranks, step=step, notes=notes, quiet=quiet)


def _edits(run: RunDirectory, config: Config, accept_changes: bool) -> list[str]:
    """What of config.yaml is not what a finished run was trained with, one line each.

    Raises RunError where that changes results, unless `accept_changes`.
    """
    facts = read_facts(run.adapter)
    different = differences(with_defaults(facts.get("config", {})), keys_that_change_results(config))
    if not accept_changes:
        refuse_changes(run.config_file, different)
    if not different and facts.get("config_file", (now := sha256_file(run.config_file))) != now:
        return [f"{run.config_file.name} was changed after the run had ended"]
    return different


def _reconcile(
    run: RunDirectory, prepared: Prepared, resumption: Resumption, accept_changes: bool
) -> list[Message]:
    """Compare the run with its checkpoint, and store what changed; returns notes. Raises RunError."""
    step, skipped = resumption.step, resumption.skipped
    none = "no checkpoint is whole" if skipped else "no checkpoint yet"
    notes = [Message(fault, "warning") for fault in skipped.values()]
    notes.append(Message(f"continuing from step {step}" if step is not None else f"{none}: starting over"))
    if step is not None:
        checkpoint, contract = run.checkpoint(step), prepared.data.training_data.renderer.contract
        different = changes(checkpoint, prepared.facts, prepared.data.base.path)
        if read_facts(checkpoint).get("prompt_contract") != contract.hash:
            with suppress(RunError):  # prompt.json shows more than the hash
                different += differences(run.read_json(run.prompt_file), contract.to_json(), "prompt.")
        if not accept_changes:
            refuse_changes(checkpoint, different)
        notes += [Message(change, "warning") for change in different]
    for damaged in skipped:
        run.set_aside(damaged)
    if step is None or accept_changes:
        write_origin(run, prepared)
    if with_absolute_paths(prepared.config) != run.config():
        run.write_config(prepared.config)
    return notes


def run_training(
    prepared: Prepared,
    run: RunDirectory,
    ranks: Ranks,
    *,
    step: int | None,
    notes: Sequence[Message],
    quiet: bool,
) -> Result:
    """Train from checkpoint `step` (None: from the start) and finish: the one path of new and resumed runs."""
    with make_observers(prepared.config, run, ranks, step, quiet) as observe, ExitStack() as stack:
        announce(prepared, observe)
        for note in notes:
            observe(note)
        if prepared.machine.device.type == "cpu" and (reason := missing()):
            text = f"no compiled kernels: torch's slower ones are used, because {reason}"
            observe(Message(text, "warning"))
        initial = tensor_digests(prepared.built.network) if prepared.config.run.verify else {}
        log = stack.enter_context(visit_log(run, ranks, step, observe))
        job = with_reference(make_context(prepared, run, ranks, observe, log))
        state = restore(job, step)
        job = job if state.refit_from is None else refit.context(job, state)
        announce_start(job, state, show_plan=step is None)
        outcome, seconds = train(job, state)
        if refit.is_due(job, state, outcome):
            if ranks.is_main:
                observe_early_end(job, state, outcome)
            job, state = refit.begin(job, state)
            outcome, more = train(job, state)
            seconds += more
        adapter, proven = run.adapter, None
        if ranks.is_main:
            adapter, proven = finish(job, state, outcome, seconds, initial)
        ranks.barrier("finished")
        losses = (state.last_loss, state.best_loss, state.base_loss)
        return Result(run.path, adapter, outcome != "interrupted", state.step, *losses, proven)


@contextmanager
def make_observers(
    config: Config, run: RunDirectory, ranks: Ranks, step: int | None, quiet: bool
) -> Iterator[Observer]:
    """Metrics file, terminal, trackers and diagnosis, of the first rank only. Metrics after `step` are dropped."""
    if not ranks.is_main:
        yield fan_out([])
        return
    run.check_held()
    lost = truncate_after(run.metrics_file, step or 0) if run.metrics_file.exists() else 0
    with ExitStack() as stack:
        record = stack.enter_context(closing(Record(run.metrics_file)))
        observers: list[Observer] = [lambda event: run.check_held(), record]
        if not quiet:
            observers.append(stack.enter_context(closing(Terminal(log_every=config.train.log_every))))
        for name in config.run.trackers:
            watcher = tracker(name, run.path.name, run.path, config.model_dump(mode="json"))
            observers.append(stack.enter_context(closing(watcher)))
        past = read_metrics(run.metrics_file) if step is not None else []
        observe = diagnosing(fan_out(observers), CurveMonitor.over(past, config.train.tolerance))
        if lost:
            observe(Message(f"{lost} damaged lines were dropped from {run.metrics_file.name}", "warning"))
        yield observe


@contextmanager
def visit_log(
    run: RunDirectory, ranks: Ranks, step: int | None, observe: Observer
) -> Iterator[VisitLog | None]:
    """The record of the rows' losses, for the first rank; what it has after `step` is dropped."""
    if not ranks.is_main:
        yield None
        return
    if run.visits_file.exists() and (last := truncate_visits(run.visits_file, step or 0)) < (step or 0):
        text = f"{run.visits_file.name} has no losses of rows from step {last + 1} to {step}"
        observe(Message(text, "warning"))
    with closing(VisitLog(run.visits_file)) as log:
        yield log


def make_context(
    prepared: Prepared, run: RunDirectory, ranks: Ranks, observe: Observer, visits: VisitLog | None = None
) -> loop.TrainContext:
    """What the loop works on: engine, optimizer, rows and settings. It seeds the random generators."""
    config, data, built = prepared.config, prepared.data, prepared.built
    network, rows = built.network, data.training_data
    num_steps = data.num_steps(config) if config.train.budget is None else 0  # time decides
    if text := start_kernels(network, built.device, sharded=is_sharded(config, ranks)):
        observe(Message(text))
    if reason := enable_compile(built.device, data.num_steps(config)):
        observe(Message(f"elementwise operations are not compiled, which is slower: {reason}", "warning"))
    network.recompute = config.train.recompute == "layers"
    network.neftune = config.train.neftune
    engine = Engine(network)
    if not ranks.is_single_process:
        engine = ReplicatedEngine(network, built.device if is_sharded(config, ranks) else None)
    packer = Packer(config.train.micro_batch_tokens, config.data.packing, may_share=not config.train.neftune)
    neutral = neutral_of(config, run, ranks, Model(network, rows.renderer))
    initial = adapter_tensors(network) if config.train.refit else {}
    epochs = num_steps / data.order.steps_per_epoch
    seed_random(config.train.seed)
    return loop.TrainContext(
        prepared=prepared,
        run=run,
        ranks=ranks,
        observe=observe,
        network=network,
        engine=engine,
        optimizer=make_optimizer(network, config),
        rows=rows.training,
        order=data.order,
        share=RankShare(ranks.rank, ranks.world_size, attention_cost(network.arch), engine.lockstep),
        packer=packer,
        heldout=packer.packs([rows.heldout.to_pack.row(index) for index in range(len(rows.heldout))]),
        cadence=Cadence.of(config, num_steps, data.order.steps_per_epoch),
        heartbeat=Heartbeat(ranks, config.distributed.timeout, run.heartbeat_file),
        samples=SampleGenerator(Model(network, rows.renderer), data.prompts, observe),
        kept=keep_streams(config, engine, rows.training, epochs, run.path, observe),
        kept_heldout=keep_streams(config, engine, rows.heldout, math.inf, run.path, observe),
        facts={**prepared.facts, **machine_facts(built.device)},
        neutral=neutral,
        initial={name: tensor.clone() for name, tensor in initial.items()},
        visits=visits,
    )


def restore(job: loop.TrainContext, step: int | None) -> TrainState:
    """The state to train from; network, optimizer and random generators get the values of checkpoint `step`."""
    built, run, ranks = job.prepared.built, job.run, job.ranks
    text = job.config.train.budget
    if step is None:
        budget = Budget.of(text) if text is not None else None
        return TrainState(scale=LossScale.for_dtype(built.dtype), budget=budget)
    folder = run.checkpoint(step)
    files = ranks.broadcast_files(folder, FILES)
    state = load_checkpoint(files, folder, job.network, job.optimizer)
    if text is not None:
        state.budget = Budget.of(text) if state.budget is None else state.budget.changed(text)
    elif state.budget is not None:
        state.budget = None
    best = state.best_step
    lost_best = best not in (None, step) and ranks.is_main and bool(verify_folder(run.checkpoint(best)))
    if ranks.any(lost_best)[0]:
        job.observe(Message(f"the best step so far, {best}, is lost: later ones count", "warning"))
        state.best_loss = state.best_step = state.lowest_loss = None
    stored = read_facts(folder) if ranks.is_main else {}
    for name, value in machine_facts(built.device).items():
        was = stored.get(name, value).replace(" 1 threads", " 1 thread")  # as version 0.1 wrote it
        if was != value:
            text = f"{name} was {was} and is {value}: the run continues, but not to the same bytes"
            job.observe(Message(text, "warning"))
    return state


def announce_start(job: loop.TrainContext, state: TrainState, *, show_plan: bool) -> None:
    """Report the size of the run, and its plan. Raises RunError where a time budget leaves no time for a step."""
    built, ranks = job.prepared.built, job.ranks
    job.observe(
        RunStarted(
            model=job.config.model.name,
            num_rows=len(job.rows),
            num_steps=job.num_steps,
            num_parameters=job.network.arch.num_parameters,
            num_trainable=sum(parameter.numel() for parameter in job.optimizer.parameters),
            device=("" if ranks.is_single_process else f"{ranks.world_size} x ") + describe(built.device),
            dtype=dtype_name(built.dtype),
            output=str(job.run.path),
        )
    )
    if show_plan and ranks.is_main:
        job.observe(Progress("measuring one pass", 0, 1))
        plan = _plan(job)
        for line in short_lines(plan):
            job.observe(Message(line))
        if state.budget is not None:
            elapsed = job.prepared.data.elapsed()
            job.observe(Message(pace.begin(state.budget, plan, elapsed)))


def _plan(job: loop.TrainContext) -> Plan:
    """The plan of the run; without times where its real pass runs out of memory, which the loop can act on."""
    prepared = job.prepared
    if not job.engine.lockstep:
        try:
            return make_plan(prepared.fitted, prepared.data, prepared.machine, job.network)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        job.observe(
            Message("no memory for the pass that the plan measures: its times are left out", "warning")
        )
    return make_plan(prepared.fitted, prepared.data, prepared.machine, None)


def train(job: loop.TrainContext, state: TrainState) -> tuple[loop.Outcome, float]:
    """The steps, and the seconds that they took. Signals end them or save. Raises RunError where memory runs out."""
    started = time.perf_counter()
    env = job.ranks.env
    with Requests(job.observe, patient=env.has_agent, abandoned=lambda: env.has_lost_agent) as requests:
        try:
            outcome = loop.train(job, state, requests)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(
                f"out of memory after step {state.step}",
                place=describe(job.prepared.built.device),
                hint=f"set train.micro_batch_tokens below {job.packer.capacity}: {loop.SAME_RESULT}",
            ) from None
    return outcome, time.perf_counter() - started


def terminal_or_silent(env: ProcessEnv, quiet: bool) -> Observer:
    """The terminal of the first rank; nothing for the others, or where `quiet`."""
    return Terminal() if env.is_main and not quiet else fan_out([])
