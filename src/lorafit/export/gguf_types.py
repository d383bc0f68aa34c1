"""Number types of a GGUF file: the type of each tensor, and rounding to it."""

from __future__ import annotations

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from torch import Tensor

_TABLES = ("lm_head.weight", "embed_tokens.weight")


def has_blocks(kind: Type, width: int) -> bool:
    """Whether rows of `width` numbers can be stored as `kind`: its blocks must divide them."""
    return width % GGML_QUANT_SIZES[kind][0] == 0


def tensor_type(type_name: str, name: str, shape: tuple[int, ...]) -> Type:
    """The type of a weight (by its Hugging Face name) in a file of type `type_name`.

    Norms and biases are float32, rows that blocks do not divide float16, and the embedding and the head of 4-bit files
    have 8 bits, as in llama.cpp.
    """
    kind = Type[type_name.upper()]
    if len(shape) == 1:
        return Type.F32
    if not has_blocks(kind, shape[-1]):
        return Type.F16
    return Type.Q8_0 if kind == Type.Q4_0 and name.endswith(_TABLES) else kind


def rounded(weight: Tensor, kind: Type) -> Tensor:
    """The float32 numbers that a program reads from the file."""
    return torch.from_numpy(np.array(dequantize(quantize(weight.float().numpy(), kind), kind)))
