"""What is looked at before a run: its rows and settings without torch, then, where it is there, the model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorafit.check.preflight import Rows, inspect, row_verdicts
from lorafit.check.settings import Given, setting_verdicts
from lorafit.check.verdict import Verdict, of_error, refuse_failed
from lorafit.config.schema import Config
from lorafit.data.formats import Row
from lorafit.data.ledger import Ledger
from lorafit.data.sources import RowReader, find_files, refuse
from lorafit.data.template import Renderer
from lorafit.data.tokenizer import Tokenizer
from lorafit.errors import ConfigError, DataError, LorafitError
from lorafit.hub import PICKLES, tokenizer_folder
from lorafit.observe.terminal import progress
from lorafit.training.material import Material, make_renderer, read_material, row_order

MOST_ROWS = 8_000  # a run looks at that many rows, or at as many as it trains: under a second, or its 2 %


@dataclass(frozen=True, slots=True)
class Checked:
    """All verdicts, and what there is to show of the rows: None where no tokenizer could say it."""

    verdicts: Sequence[Verdict]
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
        with nullcontext() if quiet else progress("checking rows") as advance:
            inspection = inspect(files, data.format, advance=advance)
    except LorafitError as error:
        return refused(error)
    return Checked(row_verdicts(inspection))


def check_data(config: Config, *, quiet: bool = False) -> Checked:
    """Rows and settings, with the model's tokenizer; no weight is read and torch is not loaded."""
    try:
        name, revision, offline = config.model.name, config.model.revision, config.run.offline
        base = tokenizer_folder(name, revision=revision, offline=offline)
        material = read_material(config, base, quiet)
        verdicts = material_verdicts(config, material, quiet)
    except LorafitError as error:
        return refused(error)
    return Checked(verdicts, material.ledger, material.encoded.lengths)


def check_run(config: Config, *, quiet: bool = False) -> Checked:
    """Everything: rows, settings, a trial of the model, memory."""
    from lorafit.training.planning import Planner
    from lorafit.training.probing import model_verdicts

    try:
        planner = Planner(config, quiet)
        material = planner.material
        verdicts = material_verdicts(config, material, quiet)
    except LorafitError as error:
        return refused(error)
    verdicts += model_verdicts(planner, quiet)
    return Checked(verdicts, material.ledger, material.encoded.lengths)


def wanted_rows(row: int | None, rows: str | None) -> range:
    """The numbers, from 0, that `--row N` or `--rows FIRST-LAST` asks for; the first row without either."""
    if rows is None:
        return range((row or 1) - 1, row or 1)
    match = re.fullmatch(r"(\d+)-(\d+)", rows)
    first, last = (int(match[1]), int(match[2])) if match else (0, 0)
    if row is not None or not 0 < first <= last:
        raise ConfigError(
            f"--rows is FIRST-LAST, from 1, not {rows}", hint="for example --rows 1-5, or --row 17"
        )
    return range(first - 1, last)


def rows_of(config: Config, wanted: range) -> tuple[Renderer, list[Row]]:
    """The rows with the numbers `wanted`, and what renders them. Raises a LorafitError."""
    data, offline = config.data, config.run.offline
    base = tokenizer_folder(config.model.name, revision=config.model.revision, offline=offline)
    renderer = make_renderer(config, Tokenizer.from_folder(base.path))
    files, missing = find_files(
        data.path, format=data.format, revision=data.revision, split=data.split, offline=offline
    )
    if missing:
        raise DataError.of(missing)
    found: list[Row] = []
    num_rows = 0
    for chunk in RowReader(files, data.format).chunks():
        num_rows = chunk.rows[-1].number + 1
        found += [row for row in chunk.rows if row.number in wanted]
        if num_rows >= wanted.stop:
            break
    if len(found) < len(wanted):
        hint = f"the last row is number {num_rows:,}"
        raise DataError(f"there is no row {wanted[len(found)] + 1:,}", place=", ".join(data.path), hint=hint)
    return renderer, found


def material_verdicts(
    config: Config, material: Material, quiet: bool, most: int | None = None
) -> list[Verdict]:
    """What the rows of a run and its settings say; at most about `most` rows are looked at."""
    rows = Rows(
        files=material.files,
        found=material.found,
        renderer=material.renderer,
        encoded=material.encoded,
        held_out=material.heldout.numbers,
        ledger=material.ledger,
        longest=material.architecture.max_position_embeddings if material.architecture else None,
    )
    order = row_order(config, material)
    train, lora = config.train, config.lora
    given = Given(
        num_steps=order.num_steps(train.epochs, train.max_steps),
        rows_per_epoch=order.rows_per_epoch,
        batch_size=train.batch_size,
        learning_rate=train.learning_rate,
        schedule=train.schedule,
        warmup=train.warmup,
        scale=lora.alpha / lora.rank,
        holdout=config.data.holdout,
        num_held_out=len(material.heldout),
        num_parameters=material.architecture.num_parameters if material.architecture else None,
        patience=train.patience,
    )
    with nullcontext() if quiet else progress("checking rows") as advance:
        inspection = inspect(material.files, config.data.format, rows, most, advance)
    return [*row_verdicts(inspection, rows), *setting_verdicts(given)]


def rows_before_training(config: Config, material: Material, quiet: bool) -> list[Verdict]:
    """What a run looks at of its rows before it starts, in no more than a moment.

    Raises DataError with all that fails, unless `run.check` says to go on.
    """
    num_steps = row_order(config, material).num_steps(config.train.epochs, config.train.max_steps)
    verdicts = material_verdicts(config, material, quiet, max(MOST_ROWS, num_steps * config.train.batch_size))
    if config.run.check == "error":
        refuse_failed(verdicts)
    return verdicts
