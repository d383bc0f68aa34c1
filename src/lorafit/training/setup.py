"""What a run needs before there is one: rows that were looked at, their order, the network, and what decides it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorafit.check.probe import trial_before_training
from lorafit.check.run import check_rows
from lorafit.config.schema import Config, keys_that_change_results
from lorafit.data.build import TrainingData
from lorafit.data.row_order import RowOrder
from lorafit.distributed.ranks import Ranks
from lorafit.errors import CheckResult, RunError
from lorafit.hub.client import ModelFolder
from lorafit.model.build import BaseModelCache, LoadedModel, build
from lorafit.model.weights import fingerprint
from lorafit.observe.events import Message, Observer
from lorafit.observe.progress import progress
from lorafit.plan.planner import Planner


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that a run needs and that can fail before there is one: rows, their order, network, adapter."""

    base: ModelFolder
    training_data: TrainingData
    order: RowOrder
    built: LoadedModel
    planner: Planner
    verdicts: Sequence[CheckResult]


def prepare(
    config: Config, ranks: Ranks, quiet: bool, base: BaseModelCache | None = None, *, resumed: bool = False
) -> Prepared:
    """Read the rows, load the model, and only then connect the ranks: nobody waits for a slow one against a clock."""
    quiet = quiet or not ranks.is_main
    planner = Planner(config, quiet, ranks.env)
    looks = ranks.is_main and not resumed and config.run.check != "none"  # what began here is not refused
    verdicts = check_rows(config, planner.training_data, planner.arch.num_parameters, quiet) if looks else []
    if not resumed:
        planner.config = config = Config.model_validate_json(
            ranks.broadcast_from_rank0("fitting", lambda: planner.fit().model_dump_json(exclude_unset=True))
        )
    with progress("loading the model", quiet=quiet) as advance:
        built = build(config, planner.base.path, planner.device, advance, is_sharded(config, ranks), base)
    if looks and not is_sharded(config, ranks):  # one rank alone cannot compute with its share
        verdicts += trial_before_training(config, planner, built.network)
    prepared = Prepared(planner.base, planner.training_data, planner.order, built, planner, verdicts)
    ranks.connect(built.device, 2 * config.distributed.timeout)  # the heartbeat comes first, and says more
    if not ranks.is_single_process and not ranks.all_equal(_digest(run_fingerprint(config, prepared))):
        raise RunError(
            f"rank {ranks.rank} of {ranks.world_size} reads another model or other rows than the first",
            place=str(planner.base.path),
            hint="every machine needs the same model and data files",
        )
    return prepared


def is_sharded(config: Config, ranks: Ranks) -> bool:
    """Whether the base is spread over the ranks, instead of whole on each."""
    return config.distributed.strategy == "fsdp" and not ranks.is_single_process


def run_fingerprint(config: Config, prepared: Prepared) -> dict[str, Any]:
    """What decides the bytes of a run, for the manifests of its checkpoints."""
    train = config.train
    return {
        "base_model": fingerprint(prepared.base.path),
        "data": prepared.training_data.digest(),
        "prompt_contract": prepared.training_data.renderer.contract.hash,
        "steps": prepared.order.num_steps(train.epochs, train.max_steps),
        "config": keys_that_change_results(config),
    }


def introduce(prepared: Prepared, observe: Observer) -> None:
    """Say what was read and what deserves a warning, before the first step."""
    training_data = prepared.training_data
    contract = training_data.renderer.contract
    observe(Message(f"format {training_data.format}: {training_data.reason}; template {contract.template}"))
    for line in training_data.ledger.lines():
        observe(Message(line))
    for warning in training_data.warnings:
        observe(Message(warning, "warning"))
    for verdict in prepared.verdicts:
        if verdict.verdict != "pass":
            observe(Message(f"{verdict.name}: {verdict.text}", "warning"))


def _digest(facts: Mapping[str, Any]) -> bytes:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()
