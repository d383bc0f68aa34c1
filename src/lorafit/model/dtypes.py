"""The number types of weights, each once: torch's type and its names in configs, safetensors files and GGUF files."""

from __future__ import annotations

from typing import NamedTuple

import torch


class DType(NamedTuple):
    """One number type."""

    torch: torch.dtype
    name: str  # in configs, and torch's own
    safetensors: str
    gguf: str  # also the short name in `lorafit export --type`


_TABLE = (
    DType(torch.float16, "float16", "F16", "f16"),
    DType(torch.bfloat16, "bfloat16", "BF16", "bf16"),
    DType(torch.float32, "float32", "F32", "f32"),
    DType(torch.float64, "float64", "F64", "f64"),
)
DTYPES = {row.name: row.torch for row in _TABLE}
BY_SAFETENSORS_NAME = {row.safetensors: row.torch for row in _TABLE}
BY_GGUF_NAME = {row.gguf: row.torch for row in _TABLE}
_BY_TORCH = {row.torch: row for row in _TABLE}


def dtype_names(dtype: torch.dtype) -> DType:
    """The row of a torch type. Raises KeyError for a type that no weight has."""
    return _BY_TORCH[dtype]


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a torch type in a config (`float32`)."""
    return _BY_TORCH[dtype].name
