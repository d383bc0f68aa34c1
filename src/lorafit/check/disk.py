"""The check that the checkpoints of a run fit on its disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from lorafit.config.schema import Config
from lorafit.errors import CheckResult
from lorafit.model.llama import Llama
from lorafit.model.lora import adapter_parameters
from lorafit.observe.units import count, memory_size
from lorafit.plan.cadence import Cadence
from lorafit.plan.planner import RunInputs
from lorafit.storage.atomic import existing

_COPIES = 3  # the adapter and AdamW's two moments


def checkpoint_bytes(network: Llama) -> int:
    """The bytes of one checkpoint of a network with its adapter."""
    return _COPIES * sum(parameter.nbytes for parameter in adapter_parameters(network).values())


def disk_verdicts(config: Config, data: RunInputs, network: Llama) -> list[CheckResult]:
    """Whether the disk of the run directory has room for the checkpoints that the run keeps, and for its adapter.

    It fails where not even one checkpoint fits: nothing of the run would be left. No result where the disk does not
    say how much is free.
    """
    size = checkpoint_bytes(network)
    # the newest ones, the best one, and one that is being written before the oldest is removed
    most = config.train.keep + 1 + config.train.keep_best
    if config.train.budget is None:
        cadence = Cadence.of(config, data.num_steps(config), data.order.steps_per_epoch)
        most = min(most, sum(due.save for due in cadence.times()) + config.train.keep_best)
    folder = existing(Path(config.run.output or "runs").expanduser())
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return []
    message = f"up to {count(most, 'checkpoint')} of {memory_size(size)}, {memory_size(free)} free"
    hint = "free space, or give --output on another disk"
    if free < size:
        return [CheckResult("disk", "fail", f"{message}: none fits", str(folder), hint)]
    if free < most * size + size // _COPIES:
        return [CheckResult("disk", "warn", f"{message}: not enough for all", str(folder), hint)]
    return [CheckResult("disk", "pass", message)]
