"""The list of the rows of a run, from its record of losses and from the rows, for `lorafit rows` and the page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Protocol

import numpy as np

from lorafit.config.schema import Config
from lorafit.data.build import TrainingData, build_data
from lorafit.data.row_ids import Contents, read_ids
from lorafit.data.row_preview import shown_row
from lorafit.errors import ConfigError, DataError, RunError
from lorafit.hub.client import tokenizer_folder
from lorafit.observe.answer_losses import read_answer_losses
from lorafit.observe.metrics_file import number, read_metrics
from lorafit.observe.units import count
from lorafit.observe.visits import read_visits
from lorafit.report.row_list import RowStory, counts_of, stories
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import read_facts

MOST_LISTED = 20  # rows on the page


class _Numbered(Protocol):
    """A dataclass about one row."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def number(self) -> int: ...


def config_of_answers(run: RunDirectory, hint: str) -> Config:
    """The config of a run that learns answers. Raises RunError with `hint` for one that compares them."""
    config = run.config()
    if config.train.method != "sft":
        message = f"the run compares answers (train.method={config.train.method})"
        raise RunError(message, place=str(run.path), hint=hint)
    return config


def data_of(run: RunDirectory, quiet: bool) -> TrainingData:
    """The rows of a run, as it read them. Raises a LorafitError, also where they are not those of its adapter."""
    config = run.config()
    model = config.model
    base = tokenizer_folder(model.name, revision=model.revision, offline=config.run.offline)
    data = build_data(config, base, None, quiet)
    was = read_facts(run.newest_adapter()).get("data")
    if was is not None and was != data.digest():
        hint = "restore the files that the run was trained on"
        raise RunError("the rows have changed since the run", place=str(run.path), hint=hint)
    return data


def rows_of(run: RunDirectory, data: TrainingData) -> list[RowStory]:
    """The stories of all visited rows, those to look at first. Raises RunError where none is recorded.

    With a second phase (`train.refit`) only its visits count: the adapter begins again. Where a second pass has read
    the answers with their questions and without them, it decides the order.
    """
    if not run.visits_file.exists():
        hint = "runs record the losses of their rows from version 0.2 on: train it again"
        raise RunError(f"the run has no `{run.visits_file.name}`", place=str(run.path), hint=hint)
    visits = read_visits(run.visits_file)
    refits = [
        number(event.get("step")) for event in read_metrics(run.metrics_file) if event["event"] == "refit"
    ]
    rows = data.encoded
    tokens, pieces = np.zeros(data.index.num_rows, np.int64), np.zeros(data.index.num_rows, np.int64)
    np.add.at(tokens, rows.numbers, rows.targets)
    np.add.at(pieces, rows.numbers, 1)
    second = read_answer_losses(run.answer_losses_file, data.digest())
    found = stories(visits, tokens, pieces, int(refits[-1] or 0) if refits else 0, second)
    if not found:
        raise RunError("no visit of a row is recorded yet", place=str(run.visits_file))
    return found


def described(data: TrainingData, listed: Sequence[_Numbered]) -> list[dict[str, Any]]:
    """Rows as JSON values with their ids, places and texts; `row` counts from 1 over all sources."""
    contents = Contents.of(data.encoded.flat.numbers, data.encoded.flat.hashes)
    texts = {row.number: row.content for row in data.index.read(sorted(story.number for story in listed))}
    rows = []
    for story in listed:
        at, content = int(np.searchsorted(contents.numbers, story.number)), texts[story.number]
        values = {"row": story.number + 1, "id": contents.id(at)}
        values |= {"place": data.index.place(story.number)}
        values |= {key: value for key, value in asdict(story).items() if key != "number"}
        rows.append({**values, "question": content.question(), "answer": content.answers()[-1]})
    return rows


def page_values(run: RunDirectory, data: TrainingData) -> Mapping[str, Any]:
    """The counts of all rows by kind, and the rows to look at, for the page."""
    found = rows_of(run, data)
    index = {int(number): at for at, number in reversed(list(enumerate(data.encoded.numbers.tolist())))}
    rows = [
        shown_row(data.encoded, index[story.number], data.tokenizer, data.index.place(story.number))
        | {"kind": story.kind, "reason": story.reason, "first": story.first, "last": story.last}
        for story in found[:MOST_LISTED]
    ]
    return {"counts": counts_of(found), "rows": rows}


def numbers_of(data: TrainingData, rows: str | None, ids: Sequence[str]) -> list[int]:
    """The numbers, from 0, of the rows that `17,40-42` and ids or files of ids name. Raises ConfigError, DataError."""
    numbers: list[int] = []
    for part in filter(None, (rows or "").split(",")):
        match = re.fullmatch(r"\s*([1-9]\d{0,9})(?:-([1-9]\d{0,9}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last:
            hint = "a number, or the first and the last of several: for example --rows 17,40-42"
            raise ConfigError(f"`{part}` names no row", place="--rows", hint=hint)
        if last > data.index.num_rows:
            hint = f"the run has {count(data.index.num_rows, 'row')}, from 1"
            raise ConfigError(f"there is no row {last}", place="--rows", hint=hint)
        numbers += range(first - 1, last)
    if wanted := read_ids(ids):
        contents = Contents.of(data.encoded.flat.numbers, data.encoded.flat.hashes)
        known = contents.among(wanted)
        if absent := [place for id_, place in wanted.items() if id_ not in known]:
            raise DataError(f"{len(absent):,} ids are of no row of the run", place=", ".join(absent[:5]))
        numbers += contents.numbers[[*known.values()]].tolist()
    if not numbers:
        raise ConfigError("no row is named", hint="--rows 17,40, or --ids FILE from `lorafit rows RUN --ids`")
    return numbers
