"""What is looked at before a run: its rows and settings without torch, then, where it is there, the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorafit.check.preflight import Rows, inspect, row_verdicts
from lorafit.check.setting_checks import RunSettings, setting_verdicts
from lorafit.check.verdict import CheckResult, of_error, refuse_failed
from lorafit.config.schema import Config
from lorafit.data.build import TrainingData, build_data, row_order
from lorafit.data.ledger import Ledger
from lorafit.data.sources import find_files, refuse
from lorafit.errors import LorafitError
from lorafit.hub.client import PICKLES, tokenizer_folder
from lorafit.model.architecture import read_architecture
from lorafit.observe.progress import progress

MOST_ROWS = 8_000  # a run looks at that many rows, or at as many as it trains: under a second, or its 2 %


@dataclass(frozen=True, slots=True)
class Checked:
    """All verdicts, and what there is to show of the rows: None where no tokenizer could say it."""

    verdicts: Sequence[CheckResult]
    ledger: Ledger | None = None
    lengths: NDArray[np.int32] | None = None

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "verdicts": [verdict.as_dict() for verdict in self.verdicts],
            "failed": any(verdict.verdict == "fail" for verdict in self.verdicts),
            "ledger": self.ledger.to_json() if self.ledger else None,
        }


def refused(error: LorafitError) -> Checked:
    """A check that ended in an error: its problems are the verdicts."""
    return Checked(of_error(error))


def has_weights(config: Config) -> bool:
    """Whether the model is more than a tokenizer; True for one of the hub."""
    folder = Path(config.model.name).expanduser()
    return not folder.is_dir() or any(path.suffix in (".safetensors", *PICKLES) for path in folder.iterdir())


def check_texts(config: Config, *, quiet: bool = False) -> Checked:
    """The rows alone, without a tokenizer: what their texts say."""
    data = config.data
    try:
        files, missing = find_files(
            data.path,
            format=data.format,
            revision=data.revision,
            split=data.split,
            offline=config.run.offline,
        )
        if missing:
            refuse(files, data.format, missing)
        with progress("checking rows", quiet=quiet) as advance:
            inspection = inspect(files, data.format, advance=advance)
    except LorafitError as error:
        return refused(error)
    return Checked(row_verdicts(inspection))


def check_data(config: Config, *, quiet: bool = False) -> Checked:
    """Rows and settings, with the model's tokenizer; no weight is read and torch is not loaded."""
    try:
        name, revision, offline = config.model.name, config.model.revision, config.run.offline
        base = tokenizer_folder(name, revision=revision, offline=offline)
        arch = read_architecture(base.path) if (base.path / "config.json").is_file() else None
        training_data = build_data(config, base, arch, quiet)
        verdicts = data_verdicts(config, training_data, arch.num_parameters if arch else None, quiet)
    except LorafitError as error:
        return refused(error)
    return Checked(verdicts, training_data.ledger, training_data.encoded.lengths)


def check_run(config: Config, *, quiet: bool = False) -> Checked:
    """Everything: rows, settings, a trial of the model, memory."""
    from lorafit.check.probe import model_verdicts
    from lorafit.distributed.env import ProcessEnv
    from lorafit.model.device import pick_device
    from lorafit.plan.machine import Machine
    from lorafit.plan.planner import RunInputs

    try:
        device = pick_device(config.model.device)
        data = RunInputs.read(config, quiet)
        machine = Machine.read(device, ProcessEnv())
        training_data = data.training_data
        verdicts = data_verdicts(config, training_data, data.arch.num_parameters, quiet)
    except LorafitError as error:
        return refused(error)
    verdicts += model_verdicts(config, data, machine, quiet)
    return Checked(verdicts, training_data.ledger, training_data.encoded.lengths)


def data_verdicts(
    config: Config,
    training_data: TrainingData,
    num_parameters: int | None,
    quiet: bool,
    most: int | None = None,
) -> list[CheckResult]:
    """What the rows of a run and its settings say; at most about `most` rows are looked at."""
    rows = Rows(
        files=training_data.files,
        found=training_data.found,
        renderer=training_data.renderer,
        encoded=training_data.encoded,
        held_out=training_data.heldout.numbers,
        ledger=training_data.ledger,
        longest=training_data.limits.max_position_embeddings if training_data.limits else None,
    )
    order = row_order(config, training_data)
    train, lora = config.train, config.lora
    given = RunSettings(
        num_steps=order.num_steps(train.epochs, train.max_steps),
        rows_per_epoch=order.rows_per_epoch,
        batch_size=train.batch_size,
        learning_rate=train.learning_rate,
        schedule=train.schedule,
        warmup=train.warmup,
        scale=lora.alpha / lora.rank,
        holdout=config.data.holdout,
        num_held_out=len(training_data.heldout),
        num_parameters=num_parameters,
        patience=train.patience,
    )
    with progress("checking rows", quiet=quiet) as advance:
        inspection = inspect(training_data.files, config.data.format, rows, most, advance)
    return [*row_verdicts(inspection, rows), *setting_verdicts(given)]


def check_rows(
    config: Config, training_data: TrainingData, num_parameters: int, quiet: bool
) -> list[CheckResult]:
    """What a run looks at of its rows before it starts, in no more than a moment.

    Raises DataError with all that fails, unless `run.check` says to go on.
    """
    num_steps = row_order(config, training_data).num_steps(config.train.epochs, config.train.max_steps)
    verdicts = data_verdicts(
        config, training_data, num_parameters, quiet, max(MOST_ROWS, num_steps * config.train.batch_size)
    )
    if config.run.check == "error":
        refuse_failed(verdicts)
    return verdicts
