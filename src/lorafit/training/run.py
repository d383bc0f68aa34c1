"""The composition root: a Config becomes a prepared run, the run is trained, and what came out is put on disk."""

from __future__ import annotations

import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from lorafit.config.schema import Config
from lorafit.data.batch import RankShare
from lorafit.data.build import TrainingData
from lorafit.data.packing import make_packs
from lorafit.distributed.env import ProcessEnv
from lorafit.distributed.parallel import Engine, ReplicatedEngine, ShardedEngine
from lorafit.distributed.ranks import Ranks, check_strategy, init_process_group
from lorafit.distributed.watchdog import Heartbeat
from lorafit.errors import RunError
from lorafit.evaluate.samples import SampleGenerator
from lorafit.model.adapter_file import load_adapter
from lorafit.model.architecture import attention_cost
from lorafit.model.build import BaseModelCache
from lorafit.model.compile import enable_compile
from lorafit.model.device import describe
from lorafit.model.dtypes import dtype_name
from lorafit.model.llama import Llama
from lorafit.model.memory import is_out_of_memory
from lorafit.model.native import missing
from lorafit.observe.curve_monitor import CurveMonitor, diagnosing
from lorafit.observe.events import Message, Observer, RunEnded, RunStarted, fan_out
from lorafit.observe.metrics_file import Record, read_metrics, truncate_after
from lorafit.observe.terminal import Terminal
from lorafit.observe.trackers import tracker
from lorafit.plan.table import short_lines
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import read_facts, verify_folder
from lorafit.training import finish, loop
from lorafit.training.checkpoint import (
    AdapterFacts,
    TrainState,
    changes,
    differences,
    export_adapter,
    load_checkpoint,
    read_checkpoint,
    refuse_changes,
    seed_random,
)
from lorafit.training.checkpoint_writer import wait_for_left
from lorafit.training.loss_scale import LossScale
from lorafit.training.optim import AdamW, warmup_steps
from lorafit.training.resume import Resumption, find_run_of_launch
from lorafit.training.setup import Prepared, introduce, is_sharded, prepare, run_fingerprint
from lorafit.training.signals import Requests, outside_steps
from lorafit.verify.proof import tensor_digests
from lorafit.version import __version__


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
    proven: bool | None = None  # None where the proof was not asked for or not reached


def start_run(config: Config, *, quiet: bool = False, base: BaseModelCache | None = None) -> Result:
    """Train a new run. Raises a LorafitError before anything is trained when config, model or data are wrong.

    `base` is handed from run to run by those who train several.
    """
    env = ProcessEnv.read()
    check_strategy(config.distributed.strategy, config.model.quantize, env)
    with init_process_group(env) as ranks, outside_steps(terminal_or_silent(quiet)):
        if ranks.broadcast_from_rank0("begun", lambda: find_run_of_launch(ranks.env, config.run.output)):
            assert config.run.output is not None
            return _resume(ranks, config.run.output, quiet=quiet, base=base)
        new = ranks.broadcast_from_rank0(
            "output", lambda: str(RunDirectory.new(config.run.output, config.model.name).path)
        )
        run = RunDirectory(Path(new))
        prepared = prepare(config, ranks, quiet, base)
        config = prepared.planner.config
        resolved = config.model_copy(update={"run": config.run.model_copy(update={"output": str(run.path)})})
        if not ranks.is_main:
            return run_training(resolved, prepared, run, ranks, step=None, notes=[], quiet=quiet)
        run.create(num_bytes=_checkpoint_bytes(prepared) * (config.train.keep + 2))
        with run.locked():
            run.check_vacant()  # another process may have begun and ended while this one read the rows
            _write_origin(run, prepared)
            run.write_json(run.env_file, _environment(ranks.env))
            run.write_config(resolved)  # last: from here on it is a run
            return run_training(resolved, prepared, run, ranks, step=None, notes=[], quiet=quiet)


def resume_run(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    accept_changes: bool = False,
    quiet: bool = False,
    base: BaseModelCache | None = None,
) -> Result:
    """Go on with a run from its newest checkpoint that verifies; a finished one is left as it is.

    `overrides` (`section.key=value`) change keys of the run from here on. Raises RunError when anything that changes
    the mathematics differs from what the checkpoint was made with, unless `accept_changes`.
    """
    with init_process_group(ProcessEnv.read()) as ranks, outside_steps(terminal_or_silent(quiet)):
        return _resume(ranks, path, overrides, accept_changes=accept_changes, quiet=quiet, base=base)


def _resume(
    ranks: Ranks,
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    accept_changes: bool = False,
    quiet: bool = False,
    base: BaseModelCache | None = None,
) -> Result:
    """`resume_run` for ranks that have met. Only the first one needs the run directory, or looks into it."""
    run = RunDirectory.open(path) if ranks.is_main else RunDirectory(Path(path).expanduser())
    wait_for_left()
    with run.locked() if ranks.is_main else nullcontext():
        there = Resumption.from_json(
            ranks.broadcast_from_rank0("resumption", lambda: Resumption.of(run, overrides).to_json())
        )
        config, step, skipped = there.config, there.step, there.skipped
        check_strategy(config.distributed.strategy, config.model.quantize, ranks.env)
        if there.finished is not None:
            if overrides:
                raise RunError(
                    f"`{path}` is finished: no setting changes it any more",
                    hint=f"start a new run from it with lora.init_from={run.adapter}",
                )
            if ranks.is_main and not quiet:
                Terminal()(Message(f"`{path}` is finished after {step} steps; nothing was changed"))
            return _result(run, run.adapter, there.finished, finished=True)
        prepared = prepare(config, ranks, quiet, base, resumed=True)
        if not ranks.is_main:
            return run_training(config, prepared, run, ranks, step=step, notes=[], quiet=quiet)
        none = "no checkpoint is whole" if skipped else "no checkpoint yet"
        notes = [Message(fault, "warning") for fault in skipped.values()]
        notes.append(Message(f"going on from step {step}" if step is not None else f"{none}: starting over"))
        facts = run_fingerprint(config, prepared)
        if step is not None:
            found = changes(run.checkpoint(step), facts) + _prompt_changes(run, step, prepared)
            if not accept_changes:
                refuse_changes(run.checkpoint(step), found)
            notes += [Message(change, "warning") for change in found]
        for damaged in skipped:
            run.set_aside(damaged)
        if step is None or accept_changes:
            _write_origin(run, prepared)
        if config != run.config():
            run.write_config(config)
        return run_training(config, prepared, run, ranks, step=step, notes=notes, quiet=quiet)


def terminal_or_silent(quiet: bool) -> Observer:
    return (lambda event: None) if quiet or not ProcessEnv.read().is_main else Terminal()


def _checkpoint_bytes(prepared: Prepared) -> int:
    """About what a checkpoint takes: each master and AdamW's two moments of it."""
    parameters = prepared.built.network.parameters()
    return sum(
        3 * parameter.numel() * parameter.element_size()
        for parameter in parameters
        if parameter.requires_grad
    )


def _write_origin(run: RunDirectory, prepared: Prepared) -> None:
    """Freeze how rows become tokens, and what became of each."""
    run.write_json(run.prompt_file, prepared.training_data.renderer.contract.to_json())
    run.write_json(run.ledger_file, prepared.training_data.ledger.to_json())
    run.write_json(run.rows_file, finish.excerpt_of(prepared.training_data))
    if prepared.verdicts:
        run.write_json(run.check_file, [verdict.as_dict() for verdict in prepared.verdicts])


def _prompt_changes(run: RunDirectory, step: int, prepared: Prepared) -> list[str]:
    """What of the prompt contract differs from that of a checkpoint, as far as prompt.json can tell."""
    contract = prepared.training_data.renderer.contract
    if read_facts(run.checkpoint(step)).get("prompt_contract") == contract.hash:
        return []
    with suppress(RunError):
        return differences(run.read_json(run.prompt_file), contract.to_json(), "prompt.")
    return []


def run_training(
    config: Config,
    prepared: Prepared,
    run: RunDirectory,
    ranks: Ranks,
    *,
    step: int | None,
    notes: Sequence[Message],
    quiet: bool,
) -> Result:
    """Train from checkpoint `step` (None from the start) and finish: the one path of new and resumed runs."""
    settings, base, training_data, built = config.train, prepared.base, prepared.training_data, prepared.built
    order = prepared.order
    num_steps = order.num_steps(settings.epochs, settings.max_steps)
    facts = run_fingerprint(config, prepared)
    lost = 0
    if ranks.is_main and run.metrics_file.exists():
        lost = truncate_after(run.metrics_file, step or 0)
    with ExitStack() as stack:
        observers: list[Observer] = []
        if ranks.is_main:
            observers.append(stack.enter_context(Record(run.metrics_file)))
        if ranks.is_main and not quiet:
            observers.append(stack.enter_context(Terminal(log_every=settings.log_every)))
        for name in config.run.trackers if ranks.is_main else ():
            watcher = tracker(name, run.path.name, run.path, config.model_dump(mode="json"))
            stack.callback(watcher.close)
            observers.append(watcher)
        past = read_metrics(run.metrics_file) if step is not None and ranks.is_main else []
        observe = diagnosing(fan_out(observers), CurveMonitor.over(past))
        introduce(prepared, observe)
        for note in notes:
            observe(note)
        if lost:
            observe(Message(f"{lost} damaged lines were dropped from {run.metrics_file.name}", "warning"))
        if built.device.type == "cpu" and (reason := missing()):
            observe(Message(f"no compiled kernels, torch's own are used and slower: {reason}", "warning"))
        enable_compile(built.device, num_steps)
        network = built.network
        network.recompute = settings.recompute == "layers"
        initial = tensor_digests(network) if config.run.verify else {}
        engine = _engine(config, network, built.device, ranks)
        adapter_parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        optimizer = AdamW(adapter_parameters, settings.weight_decay)
        seed_random(settings.seed)
        state = TrainState(scale=LossScale.for_dtype(built.dtype))
        if step is not None:
            folder = run.checkpoint(step)
            files = ranks.broadcast_files(lambda: read_checkpoint(folder))
            state = load_checkpoint(files, folder, network, optimizer)
            best = state.best_step
            lost_best = (
                best not in (None, step) and ranks.is_main and bool(verify_folder(run.checkpoint(best)))
            )
            if ranks.any(lost_best)[0]:
                observe(
                    Message(f"the best step so far, {state.best_step}, is lost: later ones count", "warning")
                )
                state.best_loss = state.best_step = None
            for change in _other_machine(folder, built.device) if ranks.is_main else ():
                observe(Message(change, "warning"))
        observe(
            RunStarted(
                model=config.model.name,
                num_rows=len(training_data.training),
                num_steps=num_steps,
                num_parameters=network.arch.num_parameters,
                num_trainable=sum(parameter.numel() for parameter in adapter_parameters),
                device=("" if ranks.is_single_process else f"{ranks.world_size} x ") + describe(built.device),
                dtype=dtype_name(built.dtype),
                output=str(run.path),
            )
        )
        if step is None and ranks.is_main:
            for line in short_lines(prepared.planner.plan(None if engine.lockstep else network)):
                observe(Message(line))
        speaker = finish.speaker_of(network, training_data, observe)
        heldout = [training_data.heldout.row(index) for index in range(len(training_data.heldout))]
        job = loop.TrainContext(
            settings=loop.Settings(
                num_steps=num_steps,
                learning_rate=settings.learning_rate,
                schedule=settings.schedule,
                warmup=warmup_steps(settings.warmup, num_steps),
                max_grad_norm=settings.max_grad_norm,
                micro_batch_tokens=settings.micro_batch_tokens,
                halve=config.run.too_large == "auto",
                packing=config.data.packing,
                eval_every=settings.eval_every,
                save_every=settings.save_every,
                samples_every=None if engine.lockstep else config.run.samples_every,
                keep=settings.keep,
                patience=settings.patience,
            ),
            ranks=ranks,
            share=RankShare(ranks.rank, ranks.world_size, attention_cost(network.arch), engine.lockstep),
            engine=engine,
            heartbeat=Heartbeat(
                ranks.store,
                ranks.rank,
                ranks.world_size,
                config.distributed.timeout,
                run.heartbeat_file,
            ),
            network=network,
            adapter_parameters=adapter_parameters,
            optimizer=optimizer,
            rows=training_data.training,
            order=order,
            places=lambda rows: ", ".join(training_data.place(index) for index in rows),
            heldout=make_packs(heldout, settings.micro_batch_tokens, config.data.packing),
            run=run,
            adapter=AdapterFacts(built.spec, config.model.name, base.revision),
            facts={**facts, **_machine(built.device)},
            observe=observe,
            speak=speaker,
        )
        started = time.perf_counter()
        with Requests(observe, patient=ranks.env.has_agent) as requests:
            try:
                reason = loop.train(job, state, requests.stop, requests.save)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise RunError(
                    f"out of memory after step {state.step}",
                    place=describe(built.device),
                    hint=f"set train.micro_batch_tokens below {settings.micro_batch_tokens}: memory, never mathematics",
                ) from None
        seconds = time.perf_counter() - started
        return _finish(config, training_data, job, state, reason, seconds, initial, speaker)


def _engine(config: Config, network: Llama, device: torch.device, ranks: Ranks) -> Engine:
    if ranks.is_single_process:
        return Engine(network)
    return ShardedEngine(network, device) if is_sharded(config, ranks) else ReplicatedEngine(network)


def _machine(device: torch.device) -> dict[str, str]:
    """What of a machine decides the last bits."""
    return {"device": device.type, "torch": torch.__version__, "machine": describe(device)}


def _other_machine(checkpoint: Path, device: torch.device) -> list[str]:
    """What differs from the machine that wrote a checkpoint: the run goes on, but to other bytes."""
    stored = read_facts(checkpoint)
    return [
        f"{name} was {stored[name]} and is {value}: the run goes on, but not to the same bytes"
        for name, value in _machine(device).items()
        if stored.get(name, value) != value
    ]


def _finish(
    config: Config,
    training_data: TrainingData,
    job: loop.TrainContext,
    state: TrainState,
    reason: Literal["finished", "ended early", "interrupted"],
    seconds: float,
    initial: Mapping[str, str],
    speaker: SampleGenerator,
) -> Result:
    """Write the final adapter, let the model speak, prove what came out, and report."""
    run = job.run
    if not job.ranks.is_main:
        job.ranks.barrier("finished")
        return _result(run, run.adapter, state, finished=reason != "interrupted")
    best = state.best_step if config.train.keep_best and state.best_step else state.step
    finished = reason != "interrupted"
    adapter = run.checkpoint(best if finished else state.step)
    if reason == "ended early":
        job.observe(Message(f"ended early: {state.num_worse} held-out measurements in a row were no better"))
    proof = None
    if finished:
        if best != state.step and (faults := verify_folder(adapter)):
            job.observe(
                Message(f"the best step, {best}, is lost ({faults[0]}): the last one counts", "warning")
            )
            best, adapter = state.step, run.checkpoint(state.step)
        export_adapter(run.adapter, adapter, {"step": best, **job.facts})
        adapter = run.adapter
        if best != state.step:
            job.observe(Message(f"the adapter is the one of step {best}, the lowest held-out loss"))
            load_adapter(job.network, adapter)
        if job.engine.lockstep:  # the first rank alone has no whole base to answer or compare with
            job.observe(
                Message(
                    "no rank holds the whole base: no answers are shown, and nothing is proven", "warning"
                )
            )
        else:
            finish.speak(run, speaker)
        if config.run.verify and not job.engine.lockstep:
            continued = config.lora.init_from is not None
            proof = finish.prove_run(
                run, job.network, training_data, initial, step=best, continued=continued, observe=job.observe
            )
    else:
        job.observe(Message(f"go on with: lorafit train --resume {run.path}"))
    with suppress(RunError):  # if an older checkpoint still cannot be removed, the next start tries again
        run.clean()
    job.observe(RunEnded(state.step, reason, seconds, str(adapter), state.last_loss or 0.0))
    finish.leave_report(run, job.observe)
    job.ranks.barrier("finished")
    proven = None if proof is None else proof.verdict != "fail"
    return _result(run, adapter, state, finished=finished, proven=proven)


def _result(
    run: RunDirectory, adapter: Path, state: TrainState, *, finished: bool, proven: bool | None = None
) -> Result:
    return Result(
        path=run.path,
        adapter=adapter,
        finished=finished,
        step=state.step,
        loss=state.last_loss,
        heldout_loss=state.best_loss,
        base_loss=state.base_loss,
        proven=proven,
    )


def _environment(env: ProcessEnv) -> dict[str, Any]:
    """Versions, machine and command of this process; holds no environment variable and no path of the user's home."""
    packages = ("torch", "tokenizers", "safetensors", "numpy", "huggingface_hub")
    return {
        "lorafit": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in packages},
        "command": shlex.join(["lorafit", *sys.argv[1:]]),
        "threads": torch.get_num_threads(),
        "ranks": env.world_size,
        "launch": env.launch,
    }
