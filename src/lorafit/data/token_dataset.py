"""All rows rendered, fitted to the longest length allowed, and stored one after the other in flat files."""

from __future__ import annotations

import mmap
import os
import weakref
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lorafit.data.formats import Row
from lorafit.data.packing import Ids, TokenRow
from lorafit.data.pair_marks import SUPERVISED, preferred
from lorafit.data.pieces import split
from lorafit.data.preference_tokens import MarkedRow, render
from lorafit.data.prompt import Dropped, Rendered, Renderer
from lorafit.data.row_faults import RowFaults
from lorafit.data.sources import Chunk
from lorafit.errors import DataError, ModelError, Problem, RunError

_NUM_LISTED = 5  # too long rows that an error names
_WIDE = 1 << 16  # vocabularies from here on need 32 bits an id

Numbers = NDArray[np.int64]
Counts = NDArray[np.int32]


class TokenFile:
    """The tokens of all rows, row after row: the ids of one row, then for each id whether it is trained, or its mark.

    The file is read, not mapped: mapped pages count as memory of the process, and a disk that fails would kill the
    process without an error.
    """

    def __init__(self, path: Path, kind: str, marked: bool = False) -> None:
        """`kind` is the numpy type of the ids; `marked`: the rows are preferences."""
        self.dtype = np.dtype(kind)
        self.marked = marked
        self._path = path
        self._mapped = None if hasattr(os, "pread") else _mapped(path, "uint8")
        if self._mapped is None:
            self._descriptor = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)

    def read(self, start: int, stop: int) -> TokenRow:
        """The row of the tokens `start` to `stop`, read-only. Raises RunError if the disk fails."""
        width, length = self.dtype.itemsize + 1, stop - start
        data = self._bytes(length * width, start * width)
        ids: Ids = np.frombuffer(data, self.dtype, length)
        kind = np.uint8 if self.marked else np.bool_
        return ids, np.frombuffer(data, kind, length, length * self.dtype.itemsize)

    def _bytes(self, count: int, offset: int) -> Any:
        if self._mapped is not None:
            return self._mapped[offset : offset + count].tobytes()
        try:
            data = os.pread(self._descriptor, count, offset)
        except OSError as error:
            raise RunError(f"tokens cannot be read: {error.strerror}", place=str(self._path)) from error
        if len(data) < count:
            hint = "another program has written to the cache; start again"
            raise RunError("tokens are missing", place=str(self._path), hint=hint)
        return data


@dataclass(frozen=True, slots=True, eq=False)
class Flat:
    """The arrays of the rows as stored on disk: row i has the tokens `offsets[i]` to `offsets[i + 1]`.

    `weighted` are the rows with other weights of the loss than 0 and 1, ascending, each with the place in `weights` of
    the weight of its first token.
    """

    tokens: TokenFile
    offsets: Numbers  # (rows + 1,)
    numbers: Numbers  # (rows,)
    truncated: Counts  # (rows,)
    targets: Counts  # (rows,)
    lines: Counts  # (rows,)
    dropped: Numbers  # (dropped rows,)
    weighted: Numbers  # (weighted rows, 2)
    weights: NDArray[np.float32]  # (tokens of the weighted rows,)
    hashes: NDArray[np.uint64]  # (rows,) of the rows' contents

    def row(self, row: int) -> TokenRow:
        """The ids of a row, and which are trained, or the weight of each."""
        start, stop = int(self.offsets[row]), int(self.offsets[row + 1])
        ids, trained = self.tokens.read(start, stop)
        at = int(np.searchsorted(self.weighted[:, 0], row))
        if at < len(self.weighted) and self.weighted[at, 0] == row:
            first = int(self.weighted[at, 1])
            return ids, self.weights[first : first + stop - start]
        return ids, trained


@dataclass(frozen=True, slots=True, eq=False)
class TokenDataset:
    """Rows as tokens on disk, all of them or (`index`) some; `row(i)` is the row at position i.

    `dropped` maps the reason to the numbers of the rows that are not here. A text that was split is several rows with
    one number, one after the other.
    """

    flat: Flat
    dropped: Mapping[str, Numbers]
    index: Numbers | None = None

    def __len__(self) -> int:
        return len(self.flat.numbers) if self.index is None else len(self.index)

    def row(self, index: int) -> TokenRow:
        """The ids of the row at `index` and which of them are training targets (bool), or the weights (float32).

        Of a preference it is the better answer with its prompt; `preferences` has both answers.
        """
        ids, trained = self.flat.row(self.place(index))
        return preferred(ids, trained) if trained.dtype == np.uint8 else (ids, trained)  # type: ignore[arg-type]

    def place(self, index: int) -> int:
        """The index of the row at `index` in all rows on disk."""
        return int(index if self.index is None else self.index[index])

    @property
    def to_pack(self) -> TokenDataset | Preferences:
        """The rows as they are packed for training: preferences with both answers."""
        return Preferences(self) if self.flat.tokens.marked else self

    @property
    def lengths(self) -> Counts:
        """Tokens of each row."""
        return self._of(np.diff(self.flat.offsets).astype(np.int32))

    @property
    def numbers(self) -> Numbers:
        """The row's number over all sources, of each row."""
        return self._of(self.flat.numbers)

    @property
    def truncated(self) -> Counts:
        """Tokens that each row lost."""
        return self._of(self.flat.truncated)

    @property
    def targets(self) -> Counts:
        """Trained tokens of each row."""
        return self._of(self.flat.targets)

    @property
    def hashes(self) -> NDArray[np.uint64]:
        """The hash of each row's content, equal for the pieces of a row."""
        return self._of(self.flat.hashes)

    def number(self, index: int) -> int:
        """The number over all sources of the row at `index`."""
        return int(self.flat.numbers[index if self.index is None else self.index[index]])

    def numbers_at(self, indices: Numbers) -> Numbers:
        """The numbers over all sources of the rows at `indices`."""
        numbers: Numbers = self.flat.numbers[indices if self.index is None else self.index[indices]]
        return numbers

    def line_of(self, number: int) -> int:
        """The first line of row `number` in its file, 0 where the file has no lines or the row is not here."""
        index = int(np.searchsorted(self.flat.numbers, number))
        is_here = index < len(self.flat.numbers) and self.flat.numbers[index] == number
        return int(self.flat.lines[index]) if is_here else 0

    def take(self, indices: Numbers) -> TokenDataset:
        """The rows at `indices`, in that order, without any dropped rows; no token is copied."""
        return TokenDataset(self.flat, {}, indices if self.index is None else self.index[indices])

    def without(self, indices: Numbers, reason: str) -> TokenDataset:
        """All rows but those at `indices`, which count as dropped for `reason`."""
        kept = np.ones(len(self), np.bool_)
        kept[indices] = False
        dropped = {**self.dropped, reason: np.unique(self.numbers[indices])}
        return TokenDataset(self.flat, dropped, self.take(np.flatnonzero(kept)).index)

    def _of(self, values: NDArray[Any]) -> NDArray[Any]:
        return values if self.index is None else values[self.index]


@dataclass(frozen=True, slots=True, eq=False)
class Preferences:
    """The preferences of `rows` with their marks (data/pair_marks.py)."""

    rows: TokenDataset

    def row(self, index: int) -> TokenRow:
        """The ids and the marks of the preference at `index`."""
        return self.rows.flat.row(self.rows.place(index))


def open_encoded(folder: Path, facts: Mapping[str, Any]) -> TokenDataset:
    """The rows that `encode_chunks` wrote to `folder`; `facts` is what it returned.

    They stay readable after the folder is removed, where the system allows that.
    """
    arrays: dict[str, Any] = {
        name: TokenFile(folder / "tokens.bin", kind, bool(facts["row_facts"].get("pairs")))
        if name == "tokens"
        else _mapped(folder / f"{name}.bin", kind)
        for name, kind in _kinds(facts).items()
    }
    arrays["weighted"] = arrays["weighted"].reshape(-1, 2)
    flat = Flat(**arrays)
    reasons = [str(reason) for reason, _ in facts["dropped"]]
    ends = np.cumsum([count for _, count in facts["dropped"]], dtype=np.int64)
    return TokenDataset(
        flat, dict(zip(reasons, np.split(flat.dropped, ends[:-1]), strict=True)) if reasons else {}
    )


def _kinds(facts: Mapping[str, Any]) -> dict[str, str]:
    """The numpy type of each array."""
    counts, numbers = ("truncated", "targets", "lines"), ("offsets", "numbers", "dropped", "weighted")
    kinds = {"tokens": str(facts["ids"]), **dict.fromkeys(counts, "int32"), "weights": "float32"}
    return {**kinds, **dict.fromkeys(numbers, "int64"), "hashes": "uint64"}


def _mapped(path: Path, kind: str) -> NDArray[Any]:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype=kind)
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=kind)


def encode_chunks(
    chunks: Iterable[Chunk],
    renderer: Renderer,
    folder: Path,
    *,
    progress: Callable[[], None] | None = None,
    drops: bool = False,
    most_readable: int | None = None,
) -> dict[str, Any]:
    """Renders all rows of `chunks`, applies the contract's `max_length` and `too_long`, and writes the arrays to
    `folder`; returns the facts that `open_encoded` needs.

    Memory does not grow with the rows. `progress` is called after each chunk. Rows that cannot be rendered are
    dropped (`drops`), else DataError has the problems of all rows; `most_readable` tokens are all that the model reads.
    """
    with ExitStack() as stack:
        writer = _Writer(stack, folder, renderer, drops, most_readable)
        for chunk in chunks:
            writer.add(chunk)
            if progress:
                progress()
        return writer.finish()


@dataclass(slots=True)
class RowFacts:
    """Weights and keys of the rows. `weights` counts the answers by the weight of their loss, `aliases` and
    `unused` the rows by key; `templated` of the `num_rows` rows are surrounded by a template. `pairs` are the counts
    of preferences (`count_pair`).
    """

    weights: dict[str, int] = field(default_factory=dict)
    aliases: dict[str, int] = field(default_factory=dict)
    unused: dict[str, int] = field(default_factory=dict)
    templated: int = 0
    num_rows: int = 0
    pairs: dict[str, int] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        """Count `row`."""
        for weight in row.content.weights():
            _count(self.weights, f"{weight * row.weight:g}")
        for key in row.aliases:
            _count(self.aliases, key)
        for key in row.unused:
            _count(self.unused, key)
        self.templated += row.content.has_template
        self.num_rows += 1

    def count_pair(self, row: MarkedRow) -> None:
        """Count a preference that is trained: rows of two answers and of one, tokens as they are computed and as they
        would be with a prompt for each answer, and the longest answer with its prompt.
        """
        separate = len(row.ids) + (len(row.answers) - 1) * row.prompt
        kind = "pairs" if len(row.answers) == 2 else "single"
        for name, value in ((kind, 1), ("computed", len(row.ids)), ("separate", separate)):
            self.pairs[name] = self.pairs.get(name, 0) + value
        self.pairs["longest"] = max(self.pairs.get("longest", 0), row.longest)


_MAX_KEYS = 1000  # that are counted one by one: rows may have any number of different keys


def _count(counts: dict[str, int], key: str) -> None:
    key = key if key in counts or len(counts) < _MAX_KEYS else "others"
    counts[key] = counts.get(key, 0) + 1


class _Writer:
    """Fits rendered rows to the contract and writes them, chunk after chunk."""

    def __init__(
        self, stack: ExitStack, folder: Path, renderer: Renderer, drops: bool, most_readable: int | None
    ) -> None:
        self._renderer, self._most_readable = renderer, most_readable
        self._code = "I" if renderer.tokenizer.vocab_size >= _WIDE else "H"
        self._kinds = _kinds({"ids": np.dtype(self._code).name})
        self._files: dict[str, BinaryIO] = {
            name: stack.enter_context((folder / f"{name}.bin").open("wb")) for name in self._kinds
        }
        self._num_tokens = self._num_read = self._longest = self._num_too_long = 0
        self._too_long: list[Row] = []
        self._dropped: dict[str, array[int]] = {}
        self._faults = RowFaults()
        self._drops = drops
        self._num_rows = self._num_weights = 0
        self._facts = RowFacts()
        self._write("offsets", [0])

    def add(self, chunk: Chunk) -> None:
        """Render and write the rows of `chunk`."""
        numbers: list[int] = []
        lines: list[int] = []
        truncated: list[int] = []
        hashes: list[int] = []
        fitting: list[Rendered] = []
        self._num_read += len(chunk.rows)
        for number, reason in chunk.dropped:
            self._drop(number, reason)
        outcomes = render(self._renderer, chunk.rows)
        for row, line, outcome in zip(chunk.rows, chunk.lines, outcomes, strict=True):
            if isinstance(outcome, Problem) and self._drops:
                self._drop(row.number, outcome.message)
            elif isinstance(outcome, Problem):
                self._faults.add(chunk.name, row.number - chunk.start + 1, row.place, outcome)
            else:
                self._facts.add(row)
                hashed = row.hash
                for piece in self._pieces(row, outcome):
                    if (fitted := self._fit(row, piece)) is not None:
                        fitting.append(fitted[0])
                        truncated.append(fitted[1])
                        numbers.append(row.number)
                        hashes.append(hashed)
                        lines.append(line)
        # Through `array` and `bytes`: several times faster than numpy on lists of millions of tokens.
        for at, fit in enumerate(fitting, self._num_rows):
            if fit.weights is not None:
                self._write("weighted", [at, self._num_weights])
                self._write("weights", np.array(fit.weights, dtype=np.float32))
                self._num_weights += len(fit.weights)
        self._num_rows += len(fitting)
        trained = [bytes(row.trained) for row in fitting]
        try:
            ids = [array(self._code, row.ids).tobytes() for row in fitting]
        except OverflowError:
            raise ModelError("gives ids beyond its own vocabulary", place="tokenizer.json") from None
        self._files["tokens"].write(b"".join(chain.from_iterable(zip(ids, trained, strict=True))))
        ends = np.cumsum([len(row) for row in trained], dtype=np.int64) + self._num_tokens
        self._num_tokens = int(ends[-1]) if len(ends) else self._num_tokens
        targets = [row.count(1) for row in trained]
        if any(isinstance(row, MarkedRow) for row in fitting):
            targets = [sum(mark & SUPERVISED for mark in row) for row in trained]
        self._write("offsets", ends)
        columns = {"numbers": numbers, "truncated": truncated, "targets": targets, "lines": lines}
        self._write("hashes", np.array(hashes, np.uint64))
        for name, values in columns.items():
            self._write(name, values)

    def finish(self) -> dict[str, Any]:
        """The facts about what was written; raises DataError with all problems."""
        problems = self._faults.problems(self._num_read)
        if self._num_too_long:
            problems.append(self._too_long_problem())
        if problems:
            raise DataError.of(problems, self._faults.num_more)
        for numbers in self._dropped.values():
            self._write("dropped", sorted(numbers))
        dropped = [[reason, len(numbers)] for reason, numbers in self._dropped.items()]
        return {"ids": self._kinds["tokens"], "dropped": dropped, "row_facts": asdict(self._facts)}

    @property
    def _max_length(self) -> int:
        return self._renderer.contract.max_length

    def _pieces(self, row: Row, outcome: Rendered | Dropped) -> Iterable[Rendered | Dropped]:
        """A text that is too long as several rows with `too_long=split`; everything else as it is."""
        longest = self._max_length
        if self._renderer.contract.too_long != "split" or row.content.asks or isinstance(outcome, Dropped):
            return [outcome]
        return split(outcome, longest, self._renderer.contract.bos_id)

    def _fit(self, row: Row, outcome: Rendered | Dropped) -> tuple[Rendered, int] | None:
        """The row as it is trained and the number of tokens that were cut, None if it is not trained."""
        longest = self._max_length
        if isinstance(outcome, Dropped):
            self._drop(row.number, outcome.reason)
            return None
        length = len(outcome.ids)
        if outcome.longest > longest:
            if self._renderer.contract.too_long in ("error", "split"):  # a row with an answer is not split
                self._num_too_long += 1
                self._longest = max(self._longest, outcome.longest)
                if len(self._too_long) < _NUM_LISTED:
                    self._too_long.append(row)
                return None
            if self._renderer.contract.too_long == "drop":
                self._drop(row.number, f"longer than {longest} tokens")
                return None
            outcome = outcome.first(longest)
        if not outcome.is_supervised:
            self._drop(row.number, f"nothing to train on in the first {longest} tokens")
            return None
        if isinstance(outcome, MarkedRow):
            self._facts.count_pair(outcome)
        return outcome, length - len(outcome.ids)

    def _drop(self, number: int, reason: str) -> None:
        self._dropped.setdefault(reason, array("q")).append(number)

    def _too_long_problem(self) -> Problem:
        """The problem of all rows that are too long. It offers a length only where the model reads that."""
        count, longest = self._num_too_long, self._longest
        most = self._most_readable or longest
        hint = "data.too_long=truncate cuts them, data.too_long=drop leaves them out"
        if any(not row.content.asks for row in self._too_long):
            hint = f"data.too_long=split makes several rows of a text, {hint}"
        if longest <= most:
            hint = f"data.max_length={longest} keeps them whole; {hint}"
        else:
            hint += f"; the model reads at most {most:,} tokens"
        what = "1 row is" if count == 1 else f"{count:,} rows are"
        message = f"{what} longer than data.max_length={self._max_length}; the longest has {longest:,} tokens"
        more = f" and {count - len(self._too_long):,} more" if count > len(self._too_long) else ""
        return Problem(message, "; ".join(row.place for row in self._too_long) + more, hint)

    def _write(self, name: str, values: Sequence[int] | NDArray[Any] | array[int]) -> None:
        self._files[name].write(np.asarray(values, dtype=self._kinds[name]).tobytes())
