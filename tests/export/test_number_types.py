"""The number types of GGUF files: mixtures, fall-backs, and blocks that llama.cpp's own code rounds."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize

from lorafit.export.gguf_model import _file_type
from lorafit.export.gguf_types import quantized, tensor_type
from lorafit.export.number_types import GGUF_TYPES, TYPES


def weight(rows: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_0, Type.Q5_0, Type.Q5_1])
def test_blocks_are_those_of_the_package_gguf(kind: Type) -> None:
    numbers = weight(130, 96)  # more rows than one call rounds
    np.testing.assert_array_equal(quantized(numbers, kind), gguf.quantize(numbers, kind))


@pytest.mark.parametrize("name", [name for name in TYPES if TYPES[name].has_blocks])
def test_every_type_is_rounded_and_named(name: str) -> None:
    """As close as its bits promise, and known to llama.cpp as a type of files."""
    numbers, kind = weight(8, 512), Type[TYPES[name].kind]
    error = np.linalg.norm(dequantize(quantized(numbers, kind), kind) - numbers) / np.linalg.norm(numbers)
    bits = gguf.GGML_QUANT_SIZES[kind][1] * 8 / gguf.GGML_QUANT_SIZES[kind][0]
    assert error < 3 * 2.0**-bits
    assert _file_type(name).name == f"MOSTLY_{name.upper()}"
    assert name in GGUF_TYPES


def test_importance_moves_the_error_to_columns_that_count_less() -> None:
    numbers, importance = weight(64, 512), np.ones(512, np.float32)
    importance[::8] = 100

    def error(weights: np.ndarray | None) -> float:
        off = dequantize(quantized(numbers, Type.Q4_K, weights), Type.Q4_K) - numbers
        return float((off[:, ::8] ** 2).mean())

    assert error(importance) < 0.9 * error(None)


def test_q4_k_m_has_more_bits_where_llama_cpp_puts_them() -> None:
    """Values and down projections: the first and last eighth of the layers, and every third between."""

    def layers(module: str) -> list[int]:
        names = [f"model.layers.{layer}.{module}.weight" for layer in range(32)]
        kinds = [tensor_type("q4_k_m", name, (512, 512), 32) for name in names]
        assert set(kinds) <= {Type.Q4_K, Type.Q6_K}
        return [layer for layer, kind in enumerate(kinds) if kind == Type.Q6_K]

    more = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert layers("self_attn.v_proj") == layers("mlp.down_proj") == more
    assert layers("self_attn.q_proj") == layers("mlp.up_proj") == []
    assert tensor_type("q4_k_m", "lm_head.weight", (512, 512), 32) == Type.Q6_K
    embedding = ("q4_k_m", "model.embed_tokens.weight", (512, 512), 32)
    assert [tensor_type(*embedding, is_tied=tied) for tied in (False, True)] == [Type.Q4_K, Type.Q6_K]


@pytest.mark.parametrize(
    ("type_name", "width", "kind"),
    [
        ("q4_k_m", 576, Type.Q5_0),
        ("q5_k_m", 576, Type.Q5_1),
        ("q6_k", 576, Type.Q8_0),
        ("iq4_xs", 576, Type.IQ4_NL),
        ("q3_k_m", 576, Type.IQ4_NL),
        ("q4_k_m", 40, Type.F16),
        ("q8_0", 40, Type.F16),
    ],
)
def test_rows_that_blocks_do_not_divide_have_shorter_ones(type_name: str, width: int, kind: Type) -> None:
    assert tensor_type(type_name, "model.layers.9.self_attn.q_proj.weight", (64, width), 32) == kind
