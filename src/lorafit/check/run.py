"""The checks before a run: of its rows and settings without torch, then of the model where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorafit.check.preflight import dropped_rows, find, inspect, row_verdicts
from lorafit.check.setting_checks import setting_verdicts
from lorafit.check.verdict import refuse_failed
from lorafit.config.auto import without_auto
from lorafit.config.schema import Config
from lorafit.data.build import TrainingData, build_data, row_order, sizes_of, sources_of
from lorafit.data.ledger import Ledger
from lorafit.data.row_index import RowIndex
from lorafit.data.row_preview import histogram
from lorafit.errors import CheckResult
from lorafit.hub.client import PICKLES, tokenizer_folder
from lorafit.model.architecture import read_architecture
from lorafit.observe.progress import progress

# a run checks that many rows, or as many as it trains: less than a second, or 2 % of its time
MOST_ROWS = 8_000


@dataclass(frozen=True, slots=True)
class Checked:
    """All results, and the account and lengths of the rows: None where there is no tokenizer."""

    verdicts: Sequence[CheckResult]
    ledger: Ledger | None = None
    lengths: NDArray[np.int32] | None = None

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "verdicts": [verdict.as_dict() for verdict in self.verdicts],
            "failed": any(verdict.verdict == "fail" for verdict in self.verdicts),
            "ledger": self.ledger.to_json() if self.ledger else None,
            "lengths": None if self.lengths is None else histogram({"training": self.lengths}),
        }


def has_weights(config: Config) -> bool:
    """Whether the model is more than a tokenizer; True for one of the hub."""
    folder = Path(config.model.name).expanduser()
    return not folder.is_dir() or any(path.suffix in (".safetensors", *PICKLES) for path in folder.iterdir())


def check_texts(config: Config, *, quiet: bool = False) -> Checked:
    """The checks of the rows' texts alone, without a tokenizer. Raises a LorafitError."""
    sources = sources_of(config)
    reader = sources.reader()
    with progress("checking rows", quiet=quiet) as advance:
        findings = inspect(reader, advance=advance)
    index = RowIndex(sources, reader.summaries)
    rows, *others = row_verdicts(findings, index)
    return Checked([rows, *dropped_rows(reader.dropped, index), *others])


def check_data(config: Config, *, quiet: bool = False) -> Checked:
    """The checks of rows and settings with the model's tokenizer; no weight is read and torch is not loaded.

    Raises a LorafitError.
    """
    name, revision, offline = config.model.name, config.model.revision, config.run.offline
    base = tokenizer_folder(name, revision=revision, offline=offline)
    arch = read_architecture(base.path) if (base.path / "config.json").is_file() else None
    training_data = build_data(config, base, arch, quiet)
    num_parameters = arch.num_parameters if arch else None
    config = without_auto(config, sizes_of(training_data, num_parameters))
    verdicts = data_verdicts(config, training_data, num_parameters, quiet)
    return Checked(verdicts, training_data.ledger, training_data.encoded.lengths)


def check_run(config: Config, *, quiet: bool = False) -> Checked:
    """All checks: rows, settings, a trial step of the model, memory. Raises a LorafitError."""
    from lorafit.check.probe import model_verdicts
    from lorafit.distributed.env import ProcessEnv
    from lorafit.model.device import pick_device
    from lorafit.plan.machine import Machine
    from lorafit.plan.planner import RunInputs

    device = pick_device(config.model.device)
    data = RunInputs.read(config, quiet)
    config = data.config
    machine = Machine.read(device, ProcessEnv())
    training_data = data.training_data
    verdicts = data_verdicts(config, training_data, data.arch.num_parameters, quiet)
    if data.base_note:
        verdicts.append(CheckResult("adapter to continue", "warn", data.base_note, "lora.init_from"))
    verdicts += model_verdicts(config, data, machine, quiet)
    return Checked(verdicts, training_data.ledger, training_data.encoded.lengths)


def data_verdicts(
    config: Config,
    training_data: TrainingData,
    num_parameters: int | None,
    quiet: bool,
    most: int | None = None,
) -> list[CheckResult]:
    """The checks of the rows of a run and of its settings; at most about `most` rows are read."""
    findings = find(training_data, most, quiet)
    order = row_order(config, training_data)
    return [
        *row_verdicts(findings, training_data.index, training_data),
        *setting_verdicts(config, order, sizes_of(training_data, num_parameters)),
    ]


def check_rows(
    config: Config, training_data: TrainingData, num_parameters: int, quiet: bool
) -> list[CheckResult]:
    """The checks of a run's rows and settings before it starts, bounded in time.

    Raises DataError with all that fails, unless `run.check` is not `error`.
    """
    num_steps = row_order(config, training_data).num_steps(config.train.epochs, config.train.max_steps)
    verdicts = data_verdicts(
        config, training_data, num_parameters, quiet, max(MOST_ROWS, num_steps * config.train.batch_size)
    )
    if config.run.check == "error":
        refuse_failed(verdicts)
    return verdicts
