"""What a run needs before there is one: rows that were looked at, their order, the network, and what decides it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from lorafit.check.verdict import Verdict
from lorafit.config.schema import Config, mathematics
from lorafit.data.loader import RowOrder
from lorafit.errors import RunError
from lorafit.hub import ModelFolder
from lorafit.model.build import Built, LoadedBase, build
from lorafit.model.weights import fingerprint
from lorafit.observe.events import Note, Observer
from lorafit.observe.terminal import progress
from lorafit.training.checking import rows_before_training
from lorafit.training.material import Material
from lorafit.training.planning import Planner
from lorafit.training.probing import trial_before_training
from lorafit.training.ranks import Ranks, share_cores


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that a run needs and that can fail before there is one: rows, their order, network, adapter."""

    base: ModelFolder
    material: Material
    order: RowOrder
    built: Built
    planner: Planner
    verdicts: Sequence[Verdict]


def prepare(
    config: Config, ranks: Ranks, quiet: bool, base: LoadedBase | None = None, *, resumed: bool = False
) -> Prepared:
    """Read the rows, load the model, and only then connect the ranks: nobody waits for a slow one against a clock."""
    share_cores(ranks.here, config.model.device)
    quiet = quiet or not ranks.first
    planner = Planner(config, quiet, ranks.here)
    looks = ranks.first and not resumed and config.run.check != "none"  # what began here is not refused
    verdicts = rows_before_training(config, planner.material, quiet) if looks else []
    if not resumed:
        planner.config = config = Config.model_validate_json(
            ranks.decide("fitting", lambda: planner.fit().model_dump_json(exclude_unset=True))
        )
    with nullcontext() if quiet else progress("loading the model") as advance:
        built = build(config, planner.base.path, advance, is_shared_out(config, ranks), base)
    if looks and not is_shared_out(config, ranks):  # one rank alone cannot compute with its share
        verdicts += trial_before_training(config, planner, built.network)
    prepared = Prepared(planner.base, planner.material, planner.order, built, planner, verdicts)
    ranks.connect(built.device, 2 * config.distributed.timeout)  # the heartbeat comes first, and says more
    if not ranks.alone and not ranks.same(_digest(facts_of(config, prepared))):
        raise RunError(
            f"rank {ranks.rank} of {ranks.world_size} reads another model or other rows than the first",
            place=str(planner.base.path),
            hint="every machine needs the same model and data files",
        )
    return prepared


def is_shared_out(config: Config, ranks: Ranks) -> bool:
    """Whether the base is spread over the ranks, instead of whole on each."""
    return config.distributed.strategy == "fsdp" and not ranks.alone


def facts_of(config: Config, prepared: Prepared) -> dict[str, Any]:
    """What decides the bytes of a run, for the manifests of its checkpoints."""
    train = config.train
    return {
        "base_model": fingerprint(prepared.base.path),
        "data": prepared.material.digest(),
        "prompt_contract": prepared.material.renderer.contract.hash,
        "steps": prepared.order.num_steps(train.epochs, train.max_steps),
        "config": mathematics(config),
    }


def introduce(prepared: Prepared, observe: Observer) -> None:
    """Say what was read and what deserves a warning, before the first step."""
    material = prepared.material
    contract = material.renderer.contract
    observe(Note(f"format {material.format}: {material.reason}; template {contract.template}"))
    for line in material.ledger.lines():
        observe(Note(line))
    for warning in material.warnings:
        observe(Note(warning, "warning"))
    for verdict in prepared.verdicts:
        if verdict.verdict != "pass":
            observe(Note(f"{verdict.name}: {verdict.text}", "warning"))


def _digest(facts: Mapping[str, Any]) -> bytes:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()
