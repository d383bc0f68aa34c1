"""Builds everything that a run needs: rows, the final config, the network, and the facts that identify the run."""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from lorafit.check.disk import disk_verdicts
from lorafit.check.probe import trial_before_training
from lorafit.check.run import check_rows
from lorafit.check.verdict import refuse_failed
from lorafit.config.schema import Config, keys_that_change_results
from lorafit.data.row_preview import excerpt
from lorafit.distributed.env import ProcessEnv
from lorafit.distributed.ranks import Ranks, share_cores
from lorafit.errors import CheckResult, RunError
from lorafit.model.build import BaseModelCache, LoadedModel, build
from lorafit.model.device import describe, pick_device
from lorafit.model.llama import Llama
from lorafit.model.weights import fingerprint
from lorafit.observe.events import Message, Observer
from lorafit.observe.progress import progress
from lorafit.plan.machine import Machine
from lorafit.plan.planner import Fit, RunInputs, fit
from lorafit.redact import redact, without_secrets
from lorafit.run_dir import RunDirectory
from lorafit.training.eva import start_at_inputs
from lorafit.version import __version__


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything that a run needs. `fitted.config` is the one final config of the run.

    `facts` identify the run in the manifests of its checkpoints: two runs with the same facts give the same bytes.
    """

    fitted: Fit
    data: RunInputs
    machine: Machine
    built: LoadedModel
    checks: Sequence[CheckResult]
    facts: Mapping[str, Any]

    @property
    def config(self) -> Config:
        """The final config."""
        return self.fitted.config


def prepare(
    config: Config, ranks: Ranks, quiet: bool, base: BaseModelCache | None = None, *, resumed: bool = False
) -> Prepared:
    """Read the rows, choose the config that fits, load the model. The ranks connect last: a slow one is waited for."""
    quiet = quiet or not ranks.is_main
    device = pick_device(config.model.device, None if ranks.is_single_process else ranks.env.local_rank)
    share_cores(ranks.env, device)
    data = RunInputs.read(config, quiet)
    config = data.config
    machine = Machine.read(device, ranks.env)
    # a resumed run is not checked again
    checked = ranks.is_main and not resumed and config.run.check != "none"
    checks = check_rows(config, data.training_data, data.arch.num_parameters, quiet) if checked else []
    fitted = Fit(config, "")
    if not resumed:
        fitted = ranks.broadcast_from_rank0("fitting", Fit, lambda: fit(config, data, machine))
    config = fitted.config
    sharded = is_sharded(config, ranks)
    with progress("loading the model", quiet=quiet) as advance:
        tokens = data.training_data.tokenizer.trained
        built = build(config, data.base.path, device, advance, sharded, base, tokens)
    if checked and not sharded:  # one rank alone cannot compute with its part of the base
        with progress("a trial step", quiet=quiet):
            checks += trial_before_training(config, data, built.network)
        checks += _room(config, data, built.network)
    facts = run_fingerprint(config, data)
    # longer than the watchdog's timeout, which says which rank is stuck
    ranks.connect(device, 2 * config.distributed.timeout)
    if config.lora.init == "eva":
        start_at_inputs(built.network, data.training_data.training, data.order, ranks)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()
    if not ranks.is_single_process and not ranks.all_equal(digest):
        raise RunError(
            f"rank {ranks.rank} of {ranks.world_size} reads another model or other rows than the first",
            place=str(data.base.path),
            hint="every machine needs the same model and data files",
        )
    return Prepared(fitted, data, machine, built, checks, facts)


def _room(config: Config, data: RunInputs, network: Llama) -> list[CheckResult]:
    """The result for the disk of the run. Raises DataError where it fails, unless `run.check` is not `error`."""
    verdicts = disk_verdicts(config, data, network)
    if config.run.check == "error":
        refuse_failed(verdicts)
    return verdicts


def is_sharded(config: Config, ranks: Ranks) -> bool:
    """Whether each rank holds a part of the base only."""
    return config.distributed.strategy == "fsdp" and not ranks.is_single_process


def run_fingerprint(config: Config, data: RunInputs) -> dict[str, Any]:
    """What decides the bytes of a run, for the manifests of its checkpoints."""
    return {
        "base_model": fingerprint(data.base.path),
        "data": data.training_data.digest(),
        "prompt_contract": data.training_data.renderer.contract.hash,
        "steps": data.num_steps(config),
        "config": keys_that_change_results(config),
    }


def announce(prepared: Prepared, observe: Observer) -> None:
    """Report what was read, and warnings, before the first step."""
    training_data = prepared.data.training_data
    contract = training_data.renderer.contract
    observe(Message(f"format {training_data.format}: {training_data.reason}; template {contract.template}"))
    for line in training_data.ledger.lines():
        observe(Message(line))
    for warning in filter(None, (*training_data.warnings, prepared.data.base_note)):
        observe(Message(warning, "warning"))
    for check in prepared.checks:
        if check.verdict != "pass":
            observe(Message(f"{check.name}: {check.text}", "warning"))


def write_origin(run: RunDirectory, prepared: Prepared) -> None:
    """Store how rows become tokens, and what became of each row."""
    rows = prepared.data.training_data
    run.write_json(run.prompt_file, rows.renderer.contract.to_json())
    run.write_json(run.ledger_file, rows.ledger.to_json())
    run.write_json(run.rows_file, excerpt(rows.training, rows.heldout, rows.tokenizer, rows.place))
    if prepared.checks:
        run.write_json(run.check_file, [check.as_dict() for check in prepared.checks])


def machine_facts(device: torch.device) -> dict[str, str]:
    """What of a machine decides the last bits of a result."""
    return {"device": device.type, "torch": torch.__version__, "machine": describe(device)}


def environment(env: ProcessEnv) -> dict[str, Any]:
    """Versions, machine and command of this process; no environment variable and no path of the user's home."""
    packages = ("torch", "tokenizers", "safetensors", "numpy", "huggingface_hub")
    return {
        "lorafit": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in packages},
        "command": redact(shlex.join(["lorafit", *without_secrets(sys.argv[1:])])),
        "threads": torch.get_num_threads(),
        "ranks": env.world_size,
        "launch": env.launch,
    }
