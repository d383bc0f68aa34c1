"""Builds the tokenised training data from a config: rows as tokens, split and accounted for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lorafit.config.auto import Sizes
from lorafit.config.schema import Config
from lorafit.data.folders import Wanted
from lorafit.data.formats import Row
from lorafit.data.ledger import Ledger
from lorafit.data.packing import TokenRow
from lorafit.data.prompt import Renderer
from lorafit.data.prompt import contract as make_contract
from lorafit.data.row_ids import Contents, Hashes, mixed, read_ids
from lorafit.data.row_index import RowIndex
from lorafit.data.row_order import Indices, RowOrder, split_holdout
from lorafit.data.sources import FileSummary, Reading, Sources, describe, find_sources
from lorafit.data.token_cache import encode_files
from lorafit.data.token_dataset import RowFacts, TokenDataset
from lorafit.data.tokenizer import Tokenizer
from lorafit.errors import DataError, ModelError
from lorafit.hub.client import ModelFolder
from lorafit.observe.progress import progress


class ModelLimits(Protocol):
    """The limits of a model: the longest row in tokens, and the number of its token embeddings."""

    @property
    def longest_row(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...


class LeftOut(NamedTuple):
    """What `data.drop_rows` names, all (pieces,): hashes of ids, numbers over all sources (0 for an id of no row),
    numbers among the pieces of a row, and whether they would be held out.
    """

    ids: Hashes
    numbers: Indices
    pieces: Indices
    is_heldout: NDArray[np.bool_]


class OwnPlaces(NamedTuple):
    """The hash of the id of each encoded row, also of those that are left out, and the rows that are left out."""

    ids: Hashes
    gone: LeftOut

    def of(self, rows: TokenDataset) -> Hashes:
        """The hashes of the ids of `rows`."""
        return self.ids if rows.index is None else self.ids[rows.index]

    def splitting(self, is_heldout: NDArray[np.bool_]) -> OwnPlaces:
        """The same with `is_heldout` for the rows that are left out."""
        return self._replace(gone=self.gone._replace(is_heldout=is_heldout))


_ROWS_READ = 200  # of more rows so many show how long the answers are
NAMED = "named in data.drop_rows"  # the reason why a row is not trained


@dataclass(frozen=True, slots=True)
class TrainingData:
    """The rows of a run as tokens, and the facts about them.

    `index` has the files of the rows. `encoded` are all rows that are not dropped, training and held-out. `samples`
    are the first held-out rows (training rows where none are held out) that have a question, as many as the config
    requests. `warnings` are about the cache; `cache_key` names the tokens in it. `limits` is None for a tokenizer
    without a model. `own` has the places of rows by their own ids, where `data.order=hash`.
    """

    index: RowIndex
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
    cache_key: str
    own: OwnPlaces | None

    def digest(self) -> str:
        """SHA-256 over tokens, masks and row numbers, and which rows are held out: what training reads of the data."""
        digest = hashlib.sha256(self.entry_digest.encode())
        digest.update(np.ascontiguousarray(self.heldout.numbers, dtype="<i8").tobytes())
        if NAMED in self.encoded.dropped:
            named = self.encoded.dropped[NAMED].astype("<i8")
            digest.update(NAMED.encode())
            digest.update((named if self.own is None else np.sort(self.own.gone.ids).astype("<u8")).tobytes())
        return digest.hexdigest()

    def with_all_rows(self) -> TrainingData:
        """The same with the held-out rows among the training rows, as `data.holdout=0` would have it."""
        everything, none = np.arange(len(self.encoded)), np.array([], dtype=np.int64)
        own = self.own
        if own is not None:
            own = own.splitting(np.zeros(len(own.gone.ids), np.bool_))
        return replace(self, training=self.encoded.take(everything), heldout=self.encoded.take(none), own=own)

    def prompts(self, count: int) -> list[Row]:
        """The first `count` held-out rows that have a question, read from their files once more."""
        return self.index.read(self.index.asking(self.heldout.numbers)[:count].tolist())

    def fixed_rows(self, count: int) -> list[TokenRow]:
        """The first `count` held-out rows, training rows where none are held out: the rows of the proof."""
        fixed = self.heldout if len(self.heldout) else self.training
        return [fixed.row(index) for index in range(min(count, len(fixed)))]

    def was_refit(self, facts: Mapping[str, object]) -> bool:
        """Whether the adapter with these facts was trained on the held-out rows too (`train.refit`)."""
        trained = facts.get("trained_rows", 0)
        return isinstance(trained, int) and trained > len(self.training)

    def place(self, index: int) -> str:
        """The place, for messages, of the row at `index` of the training rows."""
        return self.index.place(self.training.number(index))


def sources_of(config: Config) -> Sources:
    """The data files of a config: those to train on, then those to measure on. Raises a LorafitError."""
    data = config.data
    wanted = Wanted(data.split, "data.split", data.config, data.revision, config.run.offline)
    is_own = data.eval_path or data.eval_split is not None
    return find_sources(
        data.path,
        Reading(
            data.format if config.train.method == "sft" else "preference",
            data.columns,
            data.encoding,
            drops=data.bad_rows == "drop",
        ),
        wanted,
        (data.eval_path or data.path) if is_own else (),
        replace(wanted, split=data.eval_split, key="data.eval_split"),
    )


def build_data(config: Config, base: ModelFolder, limits: ModelLimits | None, quiet: bool) -> TrainingData:
    """Rows, rendered and tokenised, with the ledger closed. Raises a LorafitError with all problems.

    `limits` are those of the model in `base`; None where there is only a tokenizer.
    """
    tokenizer = Tokenizer.from_folder(base.path, tokens=config.lora.tokens)
    renderer = make_renderer(config, tokenizer)
    sources = sources_of(config)
    longest = limits.longest_row if limits else None
    with progress("tokenising", quiet=quiet) as advance:
        entry = encode_files(sources, renderer, advance, longest)
    encoded, row_facts = entry.encoded, RowFacts(**entry.facts["row_facts"])
    notes = list(entry.notes)
    own = None
    if config.data.drop_rows or config.data.order is not None:
        encoded, own = _left_out(config, encoded, notes)
    summaries = [FileSummary(**summary) for summary in entry.facts["files"]]
    index = RowIndex(sources, summaries, encoded)
    if not len(encoded):
        reasons = "; ".join(f"{len(rows):,} {reason}" for reason, rows in encoded.dropped.items())
        raise DataError(
            f"no row is left to train on: {reasons}", hint="correct the rows, or see data.max_length"
        )
    most = row_facts.pairs.get("longest") or int(encoded.lengths.max())
    if longest is not None and most > longest:
        raise DataError(
            f"the longest row has {most:,} tokens, but the model reads at most {longest:,}",
            place=index.place(encoded.number(int(encoded.lengths.argmax()))),
            hint=f"data.max_length={longest} with data.too_long=drop or data.too_long=truncate",
        )
    if limits is not None:
        most = max(tokenizer.trained, default=-1)
        _check_embedded(encoded, tokenizer, max(limits.vocab_size, most + 1))
    if (single := row_facts.pairs.get("single")) and config.train.method not in ("sft", "kto"):
        message = f"train.method={config.train.method} compares two answers, but {single:,} rows have one"
        hint = "train.method=kto learns from single answers; or give rows with `chosen` and `rejected`"
        raise DataError(message, place="train.method", hint=hint)
    if not row_facts.templated:
        notes += _without_template(config)
        renderer = Renderer(renderer.contract.as_raw(tokenizer), tokenizer)
    elif row_facts.templated < row_facts.num_rows:
        count = row_facts.num_rows - row_facts.templated
        notes.append(
            f"{count:,} rows have no template, but prompts will be asked with one, as the other rows are"
        )
    is_heldout, own = _split(config, index, encoded, own)
    training, heldout = (encoded.take(np.flatnonzero(which)) for which in (~is_heldout, is_heldout))
    if not len(training):
        hint = "give other rows in data.path"
        raise DataError("no row is left to train on: all are held out", place="data.eval_path", hint=hint)
    if not len(heldout) and any(file.heldout for file in sources.files):
        hint = "correct its rows, or see data.max_length"
        raise DataError("no row is left to measure on", place="data.eval_path", hint=hint)
    sampled = heldout if len(heldout) else training
    format_name, reason = describe(sources, summaries)
    return TrainingData(
        index=index,
        format=format_name,
        reason=reason,
        tokenizer=tokenizer,
        renderer=renderer,
        limits=limits,
        encoded=encoded,
        training=training,
        heldout=heldout,
        ledger=Ledger.of(index.num_rows, training, heldout, encoded.dropped, row_facts),
        samples=index.read(index.asking(sampled.numbers)[: config.run.samples].tolist()),
        warnings=notes,
        entry_digest=entry.digest,
        cache_key=entry.key,
        own=own,
    )


def _left_out(
    config: Config, encoded: TokenDataset, notes: list[str]
) -> tuple[TokenDataset, OwnPlaces | None]:
    """The rows that `data.drop_rows` does not name, and the places by ids, where the rows have such places.

    `notes` receives a line about ids of no row. They have places too, so that files without the rows give the same run.
    """
    wanted = read_ids(config.data.drop_rows)
    contents = Contents.of(encoded.numbers, encoded.hashes)
    named = contents.among(wanted)
    if absent := [id_ for id_ in wanted if id_ not in named]:
        places = ", ".join(wanted[id_] for id_ in absent[:5])
        notes.append(f"{len(absent):,} of {len(wanted):,} ids are of no row of the data: {places}")
    rows = np.flatnonzero(np.isin(contents.row_of, list(named.values())))
    own = None
    if config.data.order is not None:
        ids = mixed(encoded.hashes, contents.times[contents.row_of], contents.piece)
        content, times = np.array(absent, np.uint64).reshape(-1, 2).T
        numbers, pieces = (
            np.concatenate([values[rows], np.zeros(len(absent), np.int64)])
            for values in (encoded.numbers, contents.piece)
        )
        everything = np.concatenate([ids[rows], mixed(content, times, 0)])
        own = OwnPlaces(ids, LeftOut(everything, numbers, pieces, np.zeros(len(everything), np.bool_)))
    return (encoded.without(rows, NAMED) if wanted else encoded), own


def _split(
    config: Config, index: RowIndex, encoded: TokenDataset, own: OwnPlaces | None
) -> tuple[NDArray[np.bool_], OwnPlaces | None]:
    """Whether each row is held out, and each that is left out: those of the files to measure on, else some."""
    if any(file.heldout for file in index.files):
        own = own and own.splitting(index.is_heldout(own.gone.numbers))
        return index.is_heldout(encoded.numbers), own
    # a text that was split is one row
    rows, first, row_of = np.unique(encoded.numbers, return_index=True, return_inverse=True)
    holdout, seed = config.data.holdout, config.train.seed
    if own is None:
        _, heldout = split_holdout(len(rows), holdout, seed)
    else:
        begins = own.gone.pieces == 0
        everything = np.concatenate([own.of(encoded)[first], own.gone.ids[begins]])
        _, heldout = split_holdout(len(everything), holdout, seed, everything)
        of_gone = np.isin(np.arange(len(rows), len(everything)), heldout)
        own = own.splitting(of_gone[np.cumsum(begins) - 1] if len(of_gone) else of_gone)
    return np.isin(row_of, heldout), own


def _without_template(config: Config) -> list[str]:
    """The settings of the template that rows without one leave unused."""
    data = config.data
    unused = {
        f"data.template={data.template}": data.template != "auto",
        "data.system": bool(data.system),
        "data.template_args": bool(data.template_args),
    }
    return [
        f"{key} is not used: the rows are texts without a template"
        for key, is_set in unused.items()
        if is_set
    ]


def _check_embedded(encoded: TokenDataset, tokenizer: Tokenizer, num_embeddings: int) -> None:
    """Raise ModelError where a row holds a token that the model has no embedding of."""
    if tokenizer.vocab_size <= num_embeddings:
        return
    for index in range(len(encoded)):
        if (largest := int(encoded.to_pack.row(index)[0].max())) >= num_embeddings:
            raise ModelError(
                f"token `{tokenizer.decode([largest])}` of row {encoded.number(index) + 1} has id {largest}, but the "
                f"model has {num_embeddings} embeddings",
                place="tokenizer.json",
                hint="tokens were added to the tokenizer and not to the model: name them in lora.tokens",
            )


def make_renderer(config: Config, tokenizer: Tokenizer) -> Renderer:
    """The renderer of a run's rows. Raises ModelError."""
    data = config.data
    contract = make_contract(
        tokenizer,
        template=data.template,
        system=data.system,
        train_on=data.train_on,
        max_length=data.max_length,
        too_long=data.too_long,
        add_eos=data.eos,
        template_args=data.template_args,
        parse_special=data.parse_special,
    )
    return Renderer(contract, tokenizer)


def sizes_of(training_data: TrainingData, num_parameters: int | None) -> Sizes:
    """The sizes that decide what `auto` is; `num_parameters` is None where no model is known."""
    training = training_data.training
    spread = np.linspace(0, len(training) - 1, min(_ROWS_READ, len(training))).astype(int)
    answers = (ids[trained > 0].tolist() for ids, trained in map(training.row, spread.tolist()))
    characters = sum(len(training_data.tokenizer.decode(ids, skip_special=True)) for ids in answers)
    of_all = round(characters * len(training) / max(1, len(spread)))
    return Sizes(num_parameters, len(training), of_all, len(training_data.heldout))


def row_order(config: Config, training_data: TrainingData) -> RowOrder:
    """The rows of each step. Raises DataError when the weights leave none."""
    index, training, own = training_data.index, training_data.training, training_data.own
    groups, ids = index.groups(training.numbers), None
    if own is not None:
        left_out = ~own.gone.is_heldout
        numbers = np.concatenate([training.numbers, own.gone.numbers[left_out]])
        groups = [rows[np.argsort(numbers[rows], kind="stable")] for rows in index.groups(numbers)]
        ids = np.concatenate([own.of(training), own.gone.ids[left_out]])
    order = RowOrder(
        groups,
        config.data.weights or [1.0] * len(config.data.path),
        config.train.batch_size,
        config.train.seed,
        config.data.shuffle,
        ids,
        None if own is None else len(training),
    )
    if order.rows_per_epoch == 0:
        raise DataError("no row is left to train on at these weights", place="data.weights")
    return order
