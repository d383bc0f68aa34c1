"""How numbers are stored in a GGUF file: the type of each tensor, rounding to it and back."""

from __future__ import annotations

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf import LlamaFileType as FileType
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 32  # numbers that share a scale
Type = GGMLQuantizationType
_TYPES = {"f32": Type.F32, "f16": Type.F16, "bf16": Type.BF16, "q8_0": Type.Q8_0, "q4_0": Type.Q4_0}
_FILE_TYPES = {
    "f32": FileType.ALL_F32,
    "f16": FileType.MOSTLY_F16,
    "bf16": FileType.MOSTLY_BF16,
    "q8_0": FileType.MOSTLY_Q8_0,
    "q4_0": FileType.MOSTLY_Q4_0,
}
_TABLES = ("lm_head.weight", "model.embed_tokens.weight")


def file_type(name: str) -> FileType:
    """What the file as a whole says it is."""
    found: FileType = _FILE_TYPES[name]
    return found


def tensor_type(asked: str, name: str, shape: tuple[int, ...]) -> Type:
    """The type of a weight (by its Hugging Face name) in a file of type `asked`.

    Norms and biases are float32, rows that blocks do not divide float16, and 4-bit files keep the two tables of
    the vocabulary in 8 bits, as llama.cpp does.
    """
    wanted = _TYPES[asked]
    if len(shape) == 1:
        return Type.F32
    if wanted in (Type.Q8_0, Type.Q4_0) and shape[-1] % BLOCK:
        return Type.F16
    return Type.Q8_0 if wanted == Type.Q4_0 and name in _TABLES else wanted


def stored(weight: Tensor, kind: Type) -> NDArray[np.generic]:
    """A float weight as the file holds it: float16 and float32 as such, other types as bytes."""
    numbers = weight.float().numpy()
    if kind == Type.F32:
        return numbers
    if kind == Type.F16:
        return numbers.astype(np.float16)
    found: NDArray[np.generic] = quantize(numbers, kind)
    return found


def byte_shape(shape: tuple[int, ...], kind: Type) -> tuple[tuple[int, ...], type[np.generic], int]:
    """Shape and element type of what `stored` makes, and its size in bytes."""
    count = int(np.prod(shape))
    if kind == Type.F32:
        return shape, np.float32, 4 * count
    if kind == Type.F16:
        return shape, np.float16, 2 * count
    found = tuple(gguf.quant_shape_to_byte_shape(shape, kind))
    return found, np.uint8, int(np.prod(found))


def rounded(weight: Tensor, kind: Type) -> Tensor:
    """The float32 numbers that a program reads back."""
    if kind == Type.F32:
        return weight.float()
    if kind == Type.F16:
        return weight.half().float()
    return torch.from_numpy(np.array(dequantize(quantize(weight.float().numpy(), kind), kind)))
