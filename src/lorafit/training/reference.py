"""The starting point of a run as the reference of its preferences: log-probabilities, computed once before it.

They are cached beside the tokens, under a hash of all that decides them, so there is no second model. A resumed run
has the same starting point: it finds them again, or computes them again before it loads its checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lorafit.data.packing import Packer, TokenRow
from lorafit.data.token_cache import load_array, store_array
from lorafit.data.token_dataset import TokenDataset
from lorafit.distributed.ranks import Ranks
from lorafit.model.adapter_file import adapter_tensors
from lorafit.model.llama import Llama
from lorafit.training.answers import Advance, Values, measured, mismatched

_ROWS = 1024  # that are packed at a time


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """Log-probabilities at the starting point, by the place of a row on disk.

    `values` (rows on disk, 4) are those of `answers.measured`, then that of the mismatched answer (kto); NaN where
    none was computed. `digest` is their SHA-256, `adapter` the starting point itself.
    """

    values: Values
    digest: str
    adapter: Mapping[str, Tensor]

    def of(self, rows: TokenDataset, indices: Sequence[int] | NDArray[np.int64]) -> Values:
        """The values of the rows at `indices` of `rows`."""
        return self.values[[rows.place(int(index)) for index in indices]]


def starting_point(network: Llama) -> str:
    """A hash of the adapter's numbers, or `base` where its second matrices are zero, as those of a new adapter are."""
    tensors = adapter_tensors(network)
    if not any(bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name):
        return "base"
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def read_reference(
    network: Llama,
    rows: Sequence[TokenDataset],
    packer: Packer,
    ranks: Ranks,
    decides: Mapping[str, Any],
    *,
    with_mismatched: bool,
    longest: int,
    advance: Advance,
) -> Reference:
    """The reference of `rows`: from the cache, else by one pass over them. The network is at the starting point.

    `decides` is what, beside the rows' places and the starting point, the values depend on; `longest` is the most
    tokens of a mismatched row.
    """
    flat = rows[0].flat
    places = np.unique(np.concatenate([[part.place(at) for at in range(len(part))] for part in rows]))
    wanted = hashlib.sha256(places.astype("<i8").tobytes()).hexdigest()
    decides = {**decides, "start": starting_point(network), "rows": wanted, "mismatched": with_mismatched}
    key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    size = (len(flat.numbers), 4)
    values = load_array(key, size)
    if ranks.any(values is None)[0] or values is None:
        values = np.full(size, np.nan)

        def passes(row_of: Callable[[int], TokenRow], columns: slice) -> None:
            for start in range(0, len(places), _ROWS):
                some = places[start : start + _ROWS]
                packs = packer.packs([row_of(int(place)) for place in some])
                found = measured(network, packs, len(some), ranks)
                values[some, columns] = found[:, : columns.stop - columns.start]
                advance(start + len(some), len(places))

        passes(flat.row, slice(0, 3))
        if with_mismatched:
            count = len(flat.numbers)
            passes(
                lambda place: mismatched(flat.row(place), flat.row((place + 1) % count), longest), slice(3, 4)
            )
        if ranks.is_main:
            store_array(key, values)
    values.setflags(write=False)
    adapter = {name: tensor.clone() for name, tensor in adapter_tensors(network).items()}
    return Reference(values, hashlib.sha256(values.tobytes()).hexdigest(), adapter)
