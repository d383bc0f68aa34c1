"""Packs the rows of an optimizer step into few passes without padding, and merges the prefixes that rows share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lorafit.data.pair_marks import OF_ANSWER, documents_of

Ids = NDArray[np.uint16] | NDArray[np.uint32]
# The ids of one row, and which of them are supervised, or the weights of their losses, 0 for not supervised. The row of
# a preference has its prompt once, then its answers, with the marks of data/pair_marks.py (uint8).
TokenRow = tuple[Ids, NDArray[np.bool_] | NDArray[np.float32] | NDArray[np.uint8]]


@dataclass(frozen=True, slots=True)
class Pack:
    """The arrays of one forward pass.

    `ids` (tokens,) are the inputs; a shared prefix is in them once. `lengths` are the documents' token counts in
    order, `index` (sum of lengths,) the positions of their tokens in `ids`. `predict` (targets,) are the positions
    whose next token is supervised, `targets` (targets,) those next tokens, `weights` (targets,) the factors of their
    losses, None where all are 1. A row's last supervised token is a target only, so it and what follows it are no
    inputs: `num_tokens` counts the rows' tokens in full.

    `rows` (documents,) are the rows of the documents, as indices of the rows that were packed, `counts` (documents,)
    their numbers of targets, which follow one another. A row of a preference has two documents, or one: `sides`
    (documents,) says whether each is the rejected answer, and `in_answer` (targets,) which targets are not of the
    prompt; both are None for other rows.
    """

    ids: NDArray[np.int64]
    lengths: tuple[int, ...]
    index: NDArray[np.int64]
    predict: NDArray[np.int64]
    targets: NDArray[np.int64]
    num_tokens: int
    weights: NDArray[np.float32] | None = None
    rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    sides: NDArray[np.bool_] | None = None
    in_answer: NDArray[np.bool_] | None = None

    @property
    def weight(self) -> float:
        """The sum of the weights: what a mean loss is divided by. It is the number of the rows of preferences."""
        if self.sides is not None:
            return len(np.unique(self.rows))
        return len(self.targets) if self.weights is None else float(self.weights.sum(dtype=np.float64))


_ZERO = np.zeros(1, np.int64)
# For a rank without rows, which must compute a pass like the others: it adds no tokens and no targets.
EMPTY_PACK = Pack(_ZERO, (1,), _ZERO, _ZERO, _ZERO, num_tokens=0)


@dataclass(frozen=True, slots=True)
class Packer:
    """Lays rows in packs of at most `capacity` tokens; a longer row gets a pack of its own.

    Without `packing` each row is a pack. `may_share` merges prefixes that rows share. The packs of a set of rows
    never change the sum of their losses.
    """

    capacity: int
    packing: bool = True
    may_share: bool = True

    def bins(self, lengths: Sequence[int]) -> list[list[int]]:
        """The indices of `lengths` that each pack holds."""
        return best_fit(lengths, self.capacity) if self.packing else [[at] for at in range(len(lengths))]

    def packs(self, rows: Sequence[TokenRow], numbers: Sequence[int] | None = None) -> list[Pack]:
        """Packs that hold every row once. Their `rows` are indices of `rows`, or the `numbers` at these."""
        bins = self.bins([len(ids) for ids, _ in rows])
        names = range(len(rows)) if numbers is None else numbers
        return [
            build_pack([rows[at] for at in members], [names[at] for at in members], may_share=self.may_share)
            for members in bins
        ]

    def count(self, lengths: Sequence[int]) -> int:
        """How many packs rows of `lengths` tokens need."""
        return len(self.bins(lengths))


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in bins of at most `capacity`: best-fit decreasing, ties in order, deterministic."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [b for b, left in enumerate(room) if left >= lengths[index]]
        if fitting:
            best = min(fitting, key=lambda b: (room[b], b))
            bins[best].append(index)
            room[best] -= lengths[index]
        else:
            bins.append([index])
            room.append(capacity - lengths[index])
    return bins


def build_pack(
    rows: Sequence[TokenRow], numbers: Sequence[int] | None = None, *, may_share: bool = True
) -> Pack:
    """All of `rows` in one pass. `numbers` are what the pack calls them, by default their indices."""
    documents, num_tokens = [], 0
    for number, row in zip(range(len(rows)) if numbers is None else numbers, rows, strict=True):
        for side, ids, trained in documents_of(*row):
            # no token comes before the first one to predict it from
            target_at = trained[1:].nonzero()[0] + 1
            length = int(target_at[-1]) if len(target_at) else len(ids)
            documents.append((ids[:length], target_at - 1, ids[target_at], trained[target_at], number, side))
        num_tokens += len(row[0])
    documents.sort(key=lambda document: document[0].tobytes())
    texts, before, targets, weights, owners, sides = zip(*documents, strict=True)
    inputs, paths = share_prefixes(texts, may_share=may_share)
    kinds = {trained.dtype.kind for trained in weights}
    return Pack(
        inputs,
        tuple(map(len, paths)),
        np.concatenate(paths),
        np.concatenate([path[at] for path, at in zip(paths, before, strict=True)]),
        np.concatenate(targets, dtype=np.int64),
        num_tokens,
        np.concatenate(weights, dtype=np.float32) if "f" in kinds else None,
        np.array(owners, np.int64),
        np.array([len(of_document) for of_document in targets], np.int64),
        np.array(sides) if "u" in kinds else None,
        np.concatenate(weights) == OF_ANSWER if "u" in kinds else None,
    )


def share_prefixes(
    documents: Sequence[Ids], *, may_share: bool = True
) -> tuple[NDArray[np.int64], list[NDArray[np.int64]]]:
    """Merge common prefixes. Each shared token is kept once; this is exact, because a causal model's output for a token
    depends only on that token and the tokens before it. `may_share` is False where it depends on more.

    Returns the inputs, and for each document the positions of its tokens in them. All documents have one type and are
    sorted by their bytes, so that those with a common prefix are neighbours.
    """
    inputs, paths = [], []
    before, path, num_inputs = b"", np.empty(0, np.int64), 0
    for ids in documents:
        text = ids.tobytes()
        common = _common(before, text) // ids.itemsize if may_share else 0
        own = len(ids) - common
        path = np.concatenate([path[:common], np.arange(num_inputs, num_inputs + own)])
        inputs.append(ids[common:])
        paths.append(path)
        before, num_inputs = text, num_inputs + own
    return np.concatenate(inputs, dtype=np.int64), paths


def _common(one: bytes, other: bytes) -> int:
    """The length of the common prefix in bytes."""
    least = min(len(one), len(other))
    differ = int.from_bytes(one[:least], "little") ^ int.from_bytes(other[:least], "little")
    return ((differ & -differ).bit_length() - 1) // 8 if differ else least
