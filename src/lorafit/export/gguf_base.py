"""A base model that is a GGUF file: llama.cpp puts the adapter on that very file, whose template stays as it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafit.export.chat_template import WRITTEN_BOS, chat_template
from lorafit.export.number_types import TYPES, NumberType
from lorafit.export.reference import Reference, Rounding
from lorafit.export.run_source import RunSource
from lorafit.gguf_file.folder import gguf_file_of
from lorafit.model.lora_linear import GegluInput
from lorafit.model.stored_tensor import GgufTensor

TEMPLATE = "chat_template.jinja"
_K_BLOCK, _BLOCK = 256, 32
_TABLE = 10.0  # the table of GELU has the numbers up to this one


def base_file(source: RunSource) -> Path | None:
    """The GGUF file that the adapter was trained on; None for a base in safetensors."""
    return gguf_file_of(source.base.path)


def own_template(source: RunSource) -> str | None:
    """The template by which prompts were trained, if a GGUF base has another one; else None."""
    template = chat_template(source.renderer)
    # llama.cpp adds the BOS of a file itself
    is_same = template.removeprefix(WRITTEN_BOS) == source.renderer.tokenizer.chat_template
    return None if is_same or base_file(source) is None else template


def rounding_of_base(source: RunSource) -> Rounding:
    """llama.cpp computes this file and the adapter exactly but for two things: the inputs of products, which it rounds
    for each type, and GELU.
    """
    inputs = {
        name: function
        for name, stored in source.weights.items()
        if isinstance(stored, GgufTensor) and (function := _inputs_of(stored.info.type)) is not None
    }
    is_gelu = source.arch.family.activation == "gelu_pytorch_tanh"
    return Rounding(by_weight=inputs, is_merged=False, activation=HalfGeglu() if is_gelu else None)


def record_of_base(reference: Reference) -> NumberType:
    """What the adapter may cost on this file: the share of same tokens that rounded inputs alone leave, less three
    standard errors, if that is less than the share of a type without blocks.
    """
    plain, rounded = TYPES["f32"], reference.rounded
    if rounded is None:
        return plain
    share = float((rounded.best == reference.live.best).double().mean())
    least = share - 3 * math.sqrt(share * (1 - share) / len(rounded.best))
    return replace(plain, bounds=replace(plain.bounds, agreement=min(plain.bounds.agreement, least)))


def _inputs_of(kind: str) -> Callable[[Tensor], Tensor] | None:
    """How llama.cpp rounds the input of a product with a weight of the type `kind`; None if it does not."""
    if kind == "F32":
        return None
    if kind in ("F16", "BF16"):
        dtype = torch.float16 if kind == "F16" else torch.bfloat16
        return lambda x: x.to(dtype).to(x.dtype)
    block = (
        _K_BLOCK if kind.endswith("_K") or kind.startswith(("IQ1", "IQ2", "IQ3", "IQ4_XS", "TQ")) else _BLOCK
    )
    return lambda x: in_8_bits(x, block)


class HalfGeglu(GegluInput):
    """y = gelu(gate) * up as llama.cpp's `ggml_vec_geglu_f32` computes it: GELU by a table of float16 numbers."""

    def make(self, *inputs: Tensor) -> Tensor:
        gate, up = inputs
        gelu = F.gelu(gate.half().float(), approximate="tanh").half().to(gate.dtype)
        return torch.where(gate.abs() < _TABLE, gelu, gate.clamp(min=0)) * up


def in_8_bits(x: Tensor, block: int) -> Tensor:
    """`x` (tokens, width) with whole numbers up to 127 and a scale for each block of columns."""
    blocks = x.float().unflatten(-1, (-1, block))
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    stored = scale if block == _K_BLOCK else scale.half().float()
    rounded: Tensor = ((blocks / scale).round() * stored).flatten(-2).to(x.dtype)
    return rounded
