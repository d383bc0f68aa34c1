"""Number types of a GGUF file: the type of each tensor, its bytes, and rounding to it."""

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
_TABLES = ("lm_head.weight", "model.embed_tokens.weight")


def file_type(type_name: str) -> FileType:
    """The type of the file as a whole."""
    value: FileType = FileType[f"{'ALL' if type_name == 'f32' else 'MOSTLY'}_{type_name.upper()}"]
    return value


def type_named(type_name: str) -> Type:
    """The number type with the short name `type_name` (`q8_0`)."""
    return GGMLQuantizationType[type_name.upper()]


def has_blocks(kind: Type, width: int) -> bool:
    """Whether rows of `width` numbers can be stored as `kind`: its blocks must divide them."""
    return kind not in (Type.Q8_0, Type.Q4_0) or width % BLOCK == 0


def tensor_type(type_name: str, name: str, shape: tuple[int, ...]) -> Type:
    """The type of a weight (by its Hugging Face name) in a file of type `type_name`.

    Norms and biases are float32, rows that blocks do not divide float16, and the embedding and the head of 4-bit files
    have 8 bits, as in llama.cpp.
    """
    kind = type_named(type_name)
    if len(shape) == 1:
        return Type.F32
    if not has_blocks(kind, shape[-1]):
        return Type.F16
    return Type.Q8_0 if kind == Type.Q4_0 and name in _TABLES else kind


def stored(weight: Tensor, kind: Type) -> NDArray[np.generic]:
    """A float weight as stored in the file: float16 and float32 as such, other types as bytes."""
    numbers = weight.float().numpy()
    if kind == Type.F32:
        return numbers
    if kind == Type.F16:
        return numbers.astype(np.float16)
    blocks: NDArray[np.generic] = quantize(numbers, kind)
    return blocks


def byte_shape(shape: tuple[int, ...], kind: Type) -> tuple[tuple[int, ...], type[np.generic], int]:
    """Shape and element type of the array of `stored`, and its size in bytes."""
    count = int(np.prod(shape))
    if kind == Type.F32:
        return shape, np.float32, 4 * count
    if kind == Type.F16:
        return shape, np.float16, 2 * count
    in_bytes = tuple(gguf.quant_shape_to_byte_shape(shape, kind))
    return in_bytes, np.uint8, int(np.prod(in_bytes))


def rounded(weight: Tensor, kind: Type) -> Tensor:
    """The float32 numbers that a program reads from the file."""
    if kind == Type.F32:
        return weight.float()
    if kind == Type.F16:
        return weight.half().float()
    return torch.from_numpy(np.array(dequantize(quantize(weight.float().numpy(), kind), kind)))
