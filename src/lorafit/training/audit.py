"""Recomputes steps of a run from its checkpoints and rows, and compares them with what the run recorded.

A step can be recomputed from the adapter, the optimizer and the random state before it: from the start of the run,
and from each checkpoint that is kept. Loss and gradient norm of each recomputed step are in metrics.jsonl, the digest
of the adapter after the first step from each of these places too.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.distributed.ranks import Ranks
from lorafit.errors import CheckResult
from lorafit.model.adapter_file import WEIGHTS
from lorafit.model.device import deterministic_kernels
from lorafit.model.dtypes import dtype_name
from lorafit.observe.events import fan_out
from lorafit.observe.metrics_file import event_of, number, read_raw_lines
from lorafit.observe.units import count
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import read_facts, sha256_file, verify_folder
from lorafit.training import loop, refit
from lorafit.training.checkpoint import FILES, TrainState, adapter_digest, changes, load_checkpoint
from lorafit.training.loss_scale import LossScale
from lorafit.training.objective import with_reference
from lorafit.training.pace import Pace
from lorafit.training.run import make_context
from lorafit.training.setup import Prepared, machine_facts, prepare

# Relative differences of loss and gradient norm that another machine, other threads or other ranks explain.
BOUNDS = {"float64": (1e-9, 1e-7), "float32": (1e-4, 1e-2)}
_ROUGH = (0.03, 0.2)  # in 16 bits, or of a quantised base
_NUMBERS = ("loss", "grad_norm")


@dataclass(frozen=True, slots=True)
class _Record:
    """What a run recorded: its steps by number, and the digests of the adapter after some steps."""

    steps: Mapping[int, Mapping[str, Any]]
    digests: Mapping[int, str]
    num_damaged: int

    @classmethod
    def read(cls, path: Path) -> _Record:
        steps, digests, num_damaged = {}, {}, 0
        for event in map(event_of, read_raw_lines(path)):
            if event is None:
                num_damaged += 1
            elif event.get("event") == "step" and number(event.get("step")) is not None:
                steps[int(event["step"])] = event
            elif event.get("event") == "digest" and number(event.get("step")) is not None:
                digests[int(event["step"])] = str(event.get("adapter"))
        return cls(steps, digests, num_damaged)


def audit(path: str | Path, *, steps: int = 5, seed: int = 0, quiet: bool = False) -> list[CheckResult]:
    """Check the files of a run, and recompute `steps` of its steps; `seed` chooses which. Nothing is written.

    Raises a LorafitError where the run, its model or its rows cannot be read.
    """
    run, ranks = RunDirectory.open(path), Ranks()
    config, record = run.config(), _Record.read(run.metrics_file)
    results = list(_files(run, record))
    with deterministic_kernels(config.train.deterministic):
        prepared = prepare(config, ranks, quiet, resumed=True)
        facts = next((read_facts(folder) for folder in _folders(run) if not verify_folder(folder)), {})
        different = list(_changes(run, prepared))
        if different or not record.steps or not facts:
            why = "nothing is recorded" if not record.steps or not facts else "the run is another one"
            return [*results, *different, CheckResult("steps", "warn", f"none was recomputed: {why}")]
        results.append(
            CheckResult("facts", "pass", "base model, rows, prompt contract and config are the run's")
        )
        bounds = _bounds(prepared, facts, record)
        if bounds is not None:
            text = "another machine, other threads or ranks: compared within {:g} (loss) and {:g} (norm)"
            results.append(CheckResult("machine", "warn", text.format(*bounds)))
        results += _recompute(prepared, run, ranks, record, _chosen(run, record, steps, seed), bounds)
    return results


def _folders(run: RunDirectory) -> list[Path]:
    """The final adapter, and the checkpoints, newest first."""
    return [run.adapter, *(run.checkpoint(step) for step in reversed(run.saved_steps()))]


def _files(run: RunDirectory, record: _Record) -> Iterator[CheckResult]:
    """Whether the bytes on disk are those that were written."""
    for folder in _folders(run):
        if folder.is_dir():
            name = str(folder.relative_to(run.path))
            faults = verify_folder(folder, may_have_more=folder == run.adapter)
            text = faults[0] if faults else "every byte is as it was written"
            yield CheckResult("files", "fail" if faults else "pass", text, name)
    if record.num_damaged:
        yield CheckResult(
            "files", "fail", f"{count(record.num_damaged, 'line')} are damaged", run.metrics_file.name
        )
    if not run.adapter.is_dir():
        return
    facts = read_facts(run.adapter)
    if facts.get("config_file", was := sha256_file(run.config_file)) != was:
        yield CheckResult("files", "fail", "it was changed after the run had ended", run.config_file.name)
    checkpoint = run.checkpoint(int(number(facts.get("step")) or 0))
    if checkpoint.is_dir() and sha256_file(checkpoint / WEIGHTS) != sha256_file(run.adapter / WEIGHTS):
        yield CheckResult("adapter", "fail", f"it is not that of {checkpoint.name}", str(run.adapter))


def _changes(run: RunDirectory, prepared: Prepared) -> Iterator[CheckResult]:
    """What of model, rows, prompts and settings is not as any folder of the run says."""
    found: dict[str, str] = {}
    for folder in _folders(run):
        if folder.is_dir() and not verify_folder(folder, may_have_more=folder == run.adapter):
            for line in changes(folder, prepared.facts, prepared.data.base.path):
                found.setdefault(line, str(folder.relative_to(run.path)))
    for line, place in found.items():
        yield CheckResult("facts", "fail", line, place)


def _bounds(prepared: Prepared, facts: Mapping[str, Any], record: _Record) -> tuple[float, float] | None:
    """The bounds of loss and gradient norm; None where the numbers must be equal to the bit."""
    here, config = machine_facts(prepared.built.device), prepared.config
    same = all(
        str(facts.get(name)).replace(" 1 threads", " 1 thread") == value for name, value in here.items()
    )
    same = same and all((number(step.get("ranks")) or 1) == 1 for step in record.steps.values())
    if same and (prepared.built.device.type == "cpu" or config.train.deterministic):
        return None
    exact = config.model.quantize == "none"
    return BOUNDS.get(dtype_name(prepared.built.dtype), _ROUGH) if exact else _ROUGH


def _chosen(run: RunDirectory, record: _Record, steps: int, seed: int) -> dict[int, int]:
    """How many steps to recompute from each place: 0 is the start, others are checkpoints."""
    saved = [step for step in run.saved_steps() if not verify_folder(run.checkpoint(step))]
    most = {start: sum(step > start for step in record.steps) for start in (0, *saved)}
    source, chosen = random.Random(seed), dict.fromkeys(most, 0)  # noqa: S311  (a sample, no secret)
    for _ in range(steps):
        open_ones = [start for start in most if chosen[start] < most[start]]
        fewest = min((chosen[start] for start in open_ones), default=0)
        if open_ones:
            chosen[source.choice([start for start in open_ones if chosen[start] == fewest])] += 1
    return {start: number for start, number in chosen.items() if number}


def _recompute(
    prepared: Prepared,
    run: RunDirectory,
    ranks: Ranks,
    record: _Record,
    chosen: Mapping[int, int],
    bounds: tuple[float, float] | None,
) -> Iterator[CheckResult]:
    """A result for each recomputed step."""
    job = with_reference(make_context(prepared, run, ranks, fan_out([])))
    job.network.train()
    for start, steps in sorted(
        chosen.items()
    ):  # the start first: the network has its first adapter until then
        at, state = job, TrainState(scale=LossScale.for_dtype(prepared.built.dtype))
        if start:
            folder = run.checkpoint(start)
            files = {name: (folder / name).read_bytes() for name in FILES}
            state = load_checkpoint(files, folder, job.network, job.optimizer)
            at = job if state.refit_from is None else refit.context(job, state)
        for _ in range(steps):
            recorded = record.steps.get(state.step + 1)
            if recorded is None:
                break
            yield _step(at, state, recorded, record.digests.get(state.step + 1), bounds)


def _step(
    job: loop.TrainContext,
    state: TrainState,
    recorded: Mapping[str, Any],
    digest: str | None,
    bounds: tuple[float, float] | None,
) -> CheckResult:
    """Take the step after `state`, and compare it. With a time budget its rate is the recorded one."""
    name = f"step {state.step + 1}"
    gradients = loop._gradients(job, state, loop._batch(job, state, state.step))
    if gradients is None:
        return CheckResult(name, "fail", "out of memory")
    assert isinstance(gradients, tuple)  # the job reads them at once
    rate = number(recorded.get("learning_rate"))
    planned = Pace(job.config.train, job.num_steps, job.first_step)
    faults: list[str] = []
    if job.config.train.budget is None and rate != planned.rate(state.step):
        faults.append(f"learning_rate is {planned.rate(state.step)!r}, recorded {rate!r}")
    job.optimizer.step(rate or 0.0)
    job.optimizer.zero_grad()
    state.step += 1
    state.scale.went_well()
    for key, value, bound in zip(_NUMBERS, gradients[:2], bounds or (0.0, 0.0), strict=True):
        was = number(recorded.get(key))
        if was is None or not (value == was or math.isclose(value, was, rel_tol=bound)):
            faults.append(f"{key} is {value!r}, recorded {was!r}")
    compared: Sequence[str] = ("loss", "gradient norm")
    if digest is not None and bounds is None:
        compared = (*compared, "adapter")
        if (now := adapter_digest(job.network).hex()) != digest:
            faults.append(f"the adapter is {now[:12]}..., recorded {digest[:12]}...")
    how = "to the bit" if bounds is None else "within the bounds"
    if faults:
        return CheckResult(name, "fail", "; ".join(faults))
    return CheckResult(name, "pass", f"{', '.join(compared)} are equal {how}")
