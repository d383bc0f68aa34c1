"""Number types of a GGUF file: the type of each tensor, and rounding to it.

Blocks are rounded by llama.cpp's own code, the function `ggml_quantize_chunk` in the library of the package
`xllamacpp`. Its arguments are plain numbers and pointers, and its block sizes are compared with those of `gguf`.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, quant_shape_to_byte_shape
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize
from gguf.quants import quantize as quantize_simple
from numpy.typing import NDArray
from torch import Tensor

from lorafit.errors import ConfigError
from lorafit.export.number_types import TYPES
from lorafit.export.run_source import RunSource

_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"
_ROWS = 128  # that one call rounds
_SIMPLE = (Type.F32, Type.F16, Type.BF16)
# For rows that blocks of 256 do not divide: a type with blocks of 32 and no fewer bits, as in llama.cpp.
_OF_SHORT_ROWS = {
    Type.Q2_K: Type.IQ4_NL,
    Type.Q3_K: Type.IQ4_NL,
    Type.IQ4_XS: Type.IQ4_NL,
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
}


def has_blocks(kind: Type, width: int) -> bool:
    """Whether rows of `width` numbers can be stored as `kind`: its blocks must divide them."""
    return width % GGML_QUANT_SIZES[kind][0] == 0


def tensor_types(source: RunSource, type_name: str) -> dict[str, Type]:
    """The type of each weight (by its Hugging Face name) in a file of type `type_name`."""
    shapes = {name: tuple(weight.shape) for name, weight in source.weights.items()}
    layers, is_tied = source.arch.num_hidden_layers, _HEAD not in shapes
    return {name: tensor_type(type_name, name, shape, layers, is_tied) for name, shape in shapes.items()}


def tensor_type(
    type_name: str, name: str, shape: tuple[int, ...], layers: int = 1, is_tied: bool = False
) -> Type:
    """The type of a weight in a file of type `type_name`. Norms, biases and convolutions are float32.

    Rows that the blocks do not divide get a type with shorter blocks, and float16 if no block divides them.
    """
    if len(shape) != 2:
        return Type.F32
    wanted = _wanted(type_name, name, layers, is_tied)
    kinds = (wanted, _OF_SHORT_ROWS.get(wanted, wanted))
    return next((kind for kind in kinds if has_blocks(kind, shape[-1])), Type.F16)


def _wanted(type_name: str, name: str, layers: int, is_tied: bool) -> Type:
    """The type of a matrix whose rows all blocks divide."""
    record = TYPES[type_name]
    kind = Type[record.kind]
    if record.table and (
        name == _HEAD or (name.endswith(_EMBEDDING) and (is_tied or record.table == "Q8_0"))
    ):
        return Type[record.table]
    parts = name.split(".")
    if "layers" not in parts:
        return kind
    layer, module = int(parts[parts.index("layers") + 1]), parts[-2]
    more = (one for one in record.more if module in one.modules and one.where(layer, layers))
    return next((Type[one.kind] for one in more), kind)


def fallbacks(source: RunSource, type_name: str) -> str:
    """What of a file has other types than it would have if blocks divided all rows; "" if nothing."""
    is_tied = _HEAD not in source.weights
    counts: Counter[tuple[str, str, int]] = Counter()
    for name, kind in tensor_types(source, type_name).items():
        shape = source.weights[name].shape
        wanted = _wanted(type_name, name, source.arch.num_hidden_layers, is_tied)
        if len(shape) == 2 and kind != wanted:
            counts[wanted.name, kind.name, shape[-1]] += 1
    return "; ".join(
        f"{count} of {len(source.weights)} tensors are {kind} in the place of {wanted}, whose blocks do not divide "
        f"rows of {width}"
        for (wanted, kind, width), count in counts.items()
    )


def quantized(
    weight: NDArray[np.float32], kind: Type, importance: NDArray[np.float32] | None = None
) -> NDArray[np.generic]:
    """A matrix (rows, width), or a vector, as the bytes of `kind`; `importance` (width,) weighs the columns' errors."""
    if kind in _SIMPLE:
        return quantize_simple(weight, kind)
    weight = np.ascontiguousarray(weight, np.float32)
    out = np.empty(quant_shape_to_byte_shape(weight.shape, kind), np.uint8)
    weights = None
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
        assert importance.shape == weight.shape[1:]
        weights = importance.ctypes.data
    chunk = _library().ggml_quantize_chunk

    def write(start: int) -> None:
        some, bytes_of_some = weight[start : start + _ROWS], out[start : start + _ROWS]
        rows, width = some.shape
        written = chunk(kind, some.ctypes.data, bytes_of_some.ctypes.data, 0, rows, width, weights)
        assert written == bytes_of_some.nbytes

    with ThreadPoolExecutor(
        torch.get_num_threads()
    ) as threads:  # a foreign call releases the interpreter's lock
        list(threads.map(write, range(0, len(weight), _ROWS)))
    return out


def rounded(weight: Tensor, kind: Type) -> Tensor:
    """The float32 numbers that a program reads from the file."""
    return torch.from_numpy(np.array(dequantize(quantized(weight.float().numpy(), kind), kind)))


@cache
def _library() -> ctypes.CDLL:
    """llama.cpp. Raises ConfigError if the package `xllamacpp` or the function is not there."""
    hint = "pip install 'lorafit[gguf]'"
    if (spec := find_spec("xllamacpp")) is None or spec.origin is None:
        raise ConfigError("the package `xllamacpp` is needed to round weights in blocks", hint=hint)
    built = [
        *Path(spec.origin).parent.glob("xllamacpp*.so"),
        *Path(spec.origin).parent.glob("xllamacpp*.pyd"),
    ]
    library = ctypes.CDLL(str(built[0]))
    try:
        chunk, block, size = library.ggml_quantize_chunk, library.ggml_blck_size, library.ggml_type_size
    except AttributeError:
        raise ConfigError("this build of `xllamacpp` does not show ggml_quantize_chunk", hint=hint) from None
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    chunk.restype = size.restype = ctypes.c_size_t
    block.restype = number
    for kind in {*_OF_SHORT_ROWS, *_OF_SHORT_ROWS.values(), Type.Q4_0}:
        if (block(int(kind)), size(int(kind))) != GGML_QUANT_SIZES[kind]:
            raise ConfigError(f"`xllamacpp` and `gguf` have other blocks of {kind.name}", hint=hint)
    return library
