"""What a run is made of before there is a network: its rows as tokens, split, accounted for, and found again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lorafit.config.schema import Config
from lorafit.data.formats import Row
from lorafit.data.ledger import Ledger
from lorafit.data.packing import TokenRow
from lorafit.data.prompt import Renderer
from lorafit.data.prompt import contract as make_contract
from lorafit.data.readers import place_of
from lorafit.data.row_order import RowOrder, split_holdout
from lorafit.data.sources import FileSummary, SourceFile, describe, find_files, refuse, rows_at
from lorafit.data.token_cache import encode_files
from lorafit.data.token_dataset import TokenDataset
from lorafit.data.tokenizer import Tokenizer
from lorafit.errors import DataError, ModelError
from lorafit.hub.client import ModelFolder
from lorafit.observe.progress import progress


class ModelLimits(Protocol):
    """What a model can read: its context length in tokens, and how many token embeddings it has."""

    @property
    def max_position_embeddings(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...


@dataclass(frozen=True, slots=True)
class TrainingData:
    """The rows of a run as tokens, and everything said about them.

    `files` and what was `found` in them are in the order of the rows. `encoded` are all of them that are not dropped,
    training and held-out. `samples` are the first held-out rows that ask something, as many as the config wants.
    `warnings` is what a person should know about the cache. `limits` is None for a tokenizer without a model.
    """

    files: Sequence[SourceFile]
    found: Sequence[FileSummary]
    format: str
    reason: str
    tokenizer: Tokenizer
    renderer: Renderer
    limits: ModelLimits | None
    encoded: TokenDataset
    training: TokenDataset
    heldout: TokenDataset
    ledger: Ledger
    samples: Sequence[Row]
    warnings: Sequence[str]
    entry_digest: str

    def digest(self) -> str:
        """SHA-256 over tokens, masks and row numbers, and which rows are held out: what training sees of the data."""
        digest = hashlib.sha256(self.entry_digest.encode())
        digest.update(np.ascontiguousarray(self.heldout.numbers, dtype="<i8").tobytes())
        return digest.hexdigest()

    def groups(self, paths: Sequence[str]) -> list[NDArray[np.int64]]:
        """Indices into `training` of the rows that each of `data.path` gave, a folder's files together."""
        ends = np.cumsum([0, *(summary.num_rows for summary in self.found)])
        borders = np.searchsorted(self.training.numbers, ends)  # the numbers ascend
        spans: dict[int, list[NDArray[np.int64]]] = {index: [] for index in range(len(paths))}
        for file, start, end in zip(self.files, borders[:-1], borders[1:], strict=True):
            spans[paths.index(file.spec)].append(np.arange(start, end))
        return [parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in spans.values()]

    def prompts(self, count: int) -> list[Row]:
        """The first `count` held-out rows that ask something, read from their files once more."""
        return _samples(self.files, self.found, self.heldout.numbers, count)

    def fixed_rows(self, count: int) -> list[TokenRow]:
        """The first `count` held-out rows, training rows where none are held out: what a proof looks at."""
        fixed = self.heldout if len(self.heldout) else self.training
        return [fixed.row(index) for index in range(min(count, len(fixed)))]

    def place(self, index: int) -> str:
        """Where a person finds the row at `index` of the training rows."""
        return _place(self.files, self.found, self.training, index)


def _place(files: Sequence[SourceFile], found: Sequence[FileSummary], rows: TokenDataset, index: int) -> str:
    """Where a person finds the row at `index` of `rows`."""
    number = rows.number(index)
    for file, summary in zip(files, found, strict=True):
        if number < summary.num_rows:
            return place_of(file.name, number + 1, rows.line(index))
        number -= summary.num_rows
    raise AssertionError("a row without a file")


def build_data(config: Config, base: ModelFolder, limits: ModelLimits | None, quiet: bool) -> TrainingData:
    """Rows, rendered and tokenised, with the ledger closed. Raises a LorafitError with all that is wrong.

    `limits` are those of the model in `base`; None where there is only a tokenizer.
    """
    data = config.data
    tokenizer = Tokenizer.from_folder(base.path)
    files, missing = find_files(
        data.path, format=data.format, revision=data.revision, split=data.split, offline=config.run.offline
    )
    renderer = make_renderer(config, tokenizer)
    if missing:
        refuse(files, data.format, missing)
    with progress("tokenising", quiet=quiet) as advance:
        entry = encode_files(files, data.format, renderer, advance)
    encoded = entry.encoded
    found = [FileSummary(**summary) for summary in entry.facts["files"]]
    if not len(encoded):
        reasons = "; ".join(f"{len(rows):,} {reason}" for reason, rows in encoded.dropped.items())
        raise DataError(
            f"no row is left to train on: {reasons}", hint="mend the rows, or see data.max_length"
        )
    longest = limits.max_position_embeddings if limits else None
    if longest is not None and (most := int(encoded.lengths.max())) > longest:
        raise DataError(
            f"the longest row has {most:,} tokens, but the model reads at most {longest:,}",
            place=_place(files, found, encoded, int(encoded.lengths.argmax())),
            hint=f"data.max_length={longest} with data.too_long=drop or data.too_long=truncate",
        )
    if limits is not None:
        _check_embedded(encoded, tokenizer, limits.vocab_size)
    training, heldout = map(encoded.take, split_holdout(len(encoded), data.holdout, config.train.seed))
    num_rows = sum(summary.num_rows for summary in found)
    format_name, reason = describe(files, found)
    return TrainingData(
        files=files,
        found=found,
        format=format_name,
        reason=reason,
        tokenizer=tokenizer,
        renderer=renderer,
        limits=limits,
        encoded=encoded,
        training=training,
        heldout=heldout,
        ledger=Ledger.of(num_rows, training, heldout, encoded.dropped),
        samples=_samples(files, found, heldout.numbers, config.run.samples),
        warnings=entry.notes,
        entry_digest=entry.digest,
    )


def _check_embedded(encoded: TokenDataset, tokenizer: Tokenizer, num_embeddings: int) -> None:
    """Raise ModelError where a row holds a token that the model has no embedding of."""
    if tokenizer.vocab_size <= num_embeddings:
        return
    for index in range(len(encoded)):
        if (largest := int(encoded.row(index)[0].max())) >= num_embeddings:
            raise ModelError(
                f"token `{tokenizer.decode([largest])}` of row {encoded.number(index) + 1} has id {largest}, but the "
                f"model has {num_embeddings} embeddings",
                place="tokenizer.json",
                hint="tokens were added to the tokenizer and not to the model: lorafit trains no new embeddings",
            )


def make_renderer(config: Config, tokenizer: Tokenizer) -> Renderer:
    """What renders the rows of a run. Raises ModelError."""
    data = config.data
    contract = make_contract(
        tokenizer,
        template=data.template,
        system=data.system,
        train_on=data.train_on,
        max_length=data.max_length,
        too_long=data.too_long,
        add_eos=data.eos,
    )
    return Renderer(contract, tokenizer)


def row_order(config: Config, training_data: TrainingData) -> RowOrder:
    """Which rows each step trains on. Raises DataError when the weights leave none."""
    order = RowOrder(
        training_data.groups(config.data.path),
        config.data.weights or [1.0] * len(config.data.path),
        config.train.batch_size,
        config.train.seed,
        config.data.shuffle,
    )
    if order.rows_per_epoch == 0:
        raise DataError("no row is left to train on at these weights", place="data.weights")
    return order


def _samples(
    files: Sequence[SourceFile], found: Sequence[FileSummary], heldout: NDArray[np.int64], count: int
) -> list[Row]:
    """The first `count` held-out rows of the formats that have a question."""
    asks = np.array([summary.format != "text" for summary in found])
    ends = np.cumsum([summary.num_rows for summary in found])
    asking = heldout[asks[np.searchsorted(ends, heldout, side="right")]]
    return rows_at(files, found, asking[:count].tolist())
