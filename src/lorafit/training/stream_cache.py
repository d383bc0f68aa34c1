"""Keeps what the layers below the adapter compute on disk, so that later epochs start in the middle of the network."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorafit.config.schema import Config
from lorafit.data.packing import Pack
from lorafit.data.token_dataset import TokenDataset
from lorafit.distributed.parallel import Engine
from lorafit.forward import Below
from lorafit.model.lora import first_adapted
from lorafit.observe.events import Message, Observer
from lorafit.observe.units import count, memory_size

MOST_OF_FREE = 0.5  # of the disk's free space


class StreamCache:
    """The residual stream (tokens, hidden_size) of rows before `layer`, the first one with an adapter.

    Nothing below that layer is trained, and a row has the same bits in every pack, so a stored stream is the computed
    one. The file has no name: it ends with the process, however that ends, and a resumed run fills another one.
    `lengths` (rows,) are the rows' token counts. After a fault of the disk nothing is stored or read any more. Raises
    OSError where the disk of `folder` is too small.
    """

    def __init__(
        self, layer: int, lengths: NDArray[np.integer], like: Tensor, folder: Path, observe: Observer
    ) -> None:
        self.layer, self._like, self._observe = layer, like, observe
        self._token_bytes = like.shape[-1] * like.element_size()
        self._starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]) * self._token_bytes
        self.num_bytes = int(self._starts[-1])
        if self.num_bytes > MOST_OF_FREE * shutil.disk_usage(folder).free:
            raise OSError(f"{memory_size(self.num_bytes)} is more than half of the free space")
        self._stored = np.zeros(len(lengths), np.int64)  # tokens of each row; 0 for one that is not there
        self._is_broken = False
        self._file, name = tempfile.mkstemp(dir=folder, prefix=".activations-")
        weakref.finalize(self, os.close, self._file)
        Path(name).unlink()

    def of(self, numbers: NDArray[np.int64]) -> Below:
        """For packs whose `rows` are indices of `numbers`, the rows of the cache."""
        return Below(
            self.layer,
            lambda pack: self._read(pack, numbers[pack.rows]),
            lambda pack, stream: self._write(pack, numbers[pack.rows], stream),
        )

    def _read(self, pack: Pack, rows: NDArray[np.int64]) -> Tensor | None:
        """The streams of a pack's documents one after the other; None unless all are there."""
        if self._is_broken or not np.array_equal(self._stored[rows], pack.lengths):
            return None
        stream = self._like.new_empty(sum(pack.lengths), self._like.shape[-1])
        try:
            for row, part in self._parts(pack, rows, stream):
                if os.preadv(self._file, [part], int(self._starts[row])) != len(part):
                    raise OSError("the file is shorter than what was written to it")
        except OSError as error:
            self._give_up(error)
            return None
        return stream

    def _write(self, pack: Pack, rows: NDArray[np.int64], stream: Tensor) -> None:
        if self._is_broken:
            return
        try:
            for (row, part), length in zip(
                self._parts(pack, rows, stream.contiguous()), pack.lengths, strict=True
            ):
                at, end = int(self._starts[row]), int(self._starts[row]) + len(part)
                while at < end:
                    at += os.pwrite(self._file, part[at - end :], at)
                self._stored[row] = length
        except OSError as error:
            self._give_up(error)

    def _parts(self, pack: Pack, rows: NDArray[np.int64], stream: Tensor) -> Iterator[tuple[int, memoryview]]:
        """(row, its bytes in `stream`) of each document."""
        whole, start = stream.view(torch.uint8).numpy().data.cast("B"), 0
        for row, length in zip(rows.tolist(), pack.lengths, strict=True):
            end = start + length * self._token_bytes
            yield row, whole[start:end]
            start = end

    def _give_up(self, error: OSError) -> None:
        self._is_broken = True
        self._observe(_not_kept(error))


def keep_streams(
    config: Config, engine: Engine, rows: TokenDataset, passes: float, folder: Path, observe: Observer
) -> StreamCache | None:
    """The cache of `rows`, of which each is computed `passes` times; None where nothing would be read from it."""
    network = engine.network
    like = network.decoder.embed_tokens.weight
    wanted = config.train.keep_activations and passes > 1 and len(rows) > 0
    wanted = wanted and config.train.method == "sft" and not config.train.neftune
    if not wanted or engine.lockstep or like.device.type != "cpu" or not (layer := first_adapted(network)):
        return None
    try:
        cache = StreamCache(layer, rows.lengths, like, folder, observe)
    except OSError as error:
        observe(_not_kept(error))
        return None
    size = memory_size(cache.num_bytes)
    observe(Message(f"activations of {count(len(rows), 'row')} below layer {layer} are kept on disk: {size}"))
    return cache


def _not_kept(error: OSError) -> Message:
    text = f"activations of the layers below the adapter are computed again each time: {error}"
    return Message(text, "warning")
