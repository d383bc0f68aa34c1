"""A tensor in a file of a base model: safetensors, or GGUF, whose blocks the package `gguf` unpacks."""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from lorafit.errors import ModelError
from lorafit.gguf_file.header import TensorInfo

_AT_ONCE = 2**22  # numbers of a GGUF tensor that are unpacked together
_JOINED = 32  # rows
_PLAIN = {"F32", "F16", "BF16"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a model folder: its file, and its name, shape and type (`BF16`) in that file."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """The numbers, as `dtype` if it is given; the file is open for this tensor only."""
        with safe_open(self.file, framework="pt", device="cpu") as file:
            tensor: Tensor = file.get_tensor(self.name).clone()
        return tensor if dtype is None else tensor.to(dtype)


@dataclass(frozen=True, slots=True)
class GgufTensor(StoredTensor):
    """A tensor of a GGUF file. `dtype` is BF16 for types with blocks: the type that they are computed in.

    `rotated` is the width of heads whose rotated pairs are neighbours in the file, 0 if they are not; `offset` is what
    the file adds to the numbers.
    """

    info: TensorInfo
    rotated: int = 0
    offset: float = 0.0

    @classmethod
    def of(cls, file: Path, info: TensorInfo, rotated: int, offset: float) -> GgufTensor:
        """The tensor of a header. Raises ModelError for a type that the package `gguf` does not unpack."""
        if info.type not in _unpacked():
            message = f"the tensor `{info.name}` has the type {info.type}, which is not supported"
            raise ModelError(message, place=str(file))
        dtype = info.type if info.type in _PLAIN else "BF16"
        return cls(file, info.name, info.shape, dtype, info, rotated, offset)

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        from gguf import GGMLQuantizationType as Type
        from gguf.quants import dequantize

        width, rows = self.info.shape[-1], math.prod(self.info.shape[:-1])
        row_bytes = self.info.num_bytes // rows
        content = np.memmap(self.file, np.uint8, "r", self.info.start, (rows, row_bytes))
        out = torch.empty((rows, width), dtype=dtype or torch.float32)
        step = max(_JOINED, _AT_ONCE // width // _JOINED * _JOINED)
        for start in range(0, rows, step):
            part = content[start : start + step]
            # `gguf` unpacks 16 rows in a call: longer ones are faster
            lines = part.reshape(-1, math.gcd(len(part), _JOINED) * row_bytes)
            numbers = torch.from_numpy(np.array(dequantize(lines, Type[self.info.type]), np.float32))
            out[start : start + step] = numbers.view(len(part), width) - self.offset
        if self.rotated:  # neighbours become the halves of a head
            flat = out.view(rows * width // self._row_width, self._row_width)
            out = flat.unflatten(0, (-1, self.rotated // 2, 2)).transpose(1, 2).flatten(0, 2)
        return out.reshape(self.info.shape)

    @property
    def _row_width(self) -> int:
        """The numbers of a row of a matrix; of a vector 1, because its numbers belong to rows."""
        return self.shape[-1] if len(self.shape) > 1 else 1


@functools.cache
def _unpacked() -> frozenset[str]:
    """The names of the types that the package `gguf` unpacks."""
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    names = set()
    for kind, (_, num_bytes) in GGML_QUANT_SIZES.items():
        with contextlib.suppress(NotImplementedError, TypeError):
            names |= (
                {kind.name}
                if dequantize(np.zeros((1, num_bytes), np.uint8), kind).dtype == np.float32
                else set()
            )
    return frozenset(names)
