"""Small GGUF files that tests write with the package `gguf`: random networks with a byte vocabulary."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import TokenType
from tests.tiny_models import CHAT_TEMPLATE, byte_tokenizer, config_of, random_network

from lorafit.export.gguf_model import permuted
from lorafit.export.gguf_types import quantized
from lorafit.model.llama import Llama

_LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
# The tiny family, its changes, llama.cpp's name and further keys.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "llama", {}),
    "llama-tied": ("llama-tied", "llama", {}),
    "llama3": ("llama3", "llama", {"rope_theta": 500000.0, "rope_scaling": _LLAMA_3}),
    "llama-linear": ("llama-linear", "llama", {}),
    "llama-yarn": ("llama-yarn", "llama", {}),
    "mistral": ("mistral", "llama", {}),
    "qwen2": ("qwen2", "qwen2", {}),
    "qwen3": ("qwen3", "qwen3", {}),
    "smollm3": ("smollm3", "smollm3", {"no_rope_layers": None, "num_hidden_layers": 4}),
    "granite": ("granite", "granite", {}),
    "olmo2": ("olmo2", "olmo2", {"hidden_size": 64}),  # llama.cpp's norms of q and k have the network's width
    "hunyuan": ("hunyuan", "hunyuan-dense", {}),
    "gemma2": ("gemma2", "gemma2", {"query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3", "gemma3", {"query_pre_attn_scalar": 16, "layer_types": None}),
    "phi3": ("phi3", "phi3", {"sliding_window": None}),
    "phi3-longrope": ("phi3-longrope", "phi3", {"original_max_position_embeddings": 256}),
}


def network_of(name: str, seed: int = 0, **changes: Any) -> Llama:
    """The random network of one of FAMILIES."""
    family, _, own = FAMILIES[name]
    return random_network(family, seed, **{**own, **changes})


def write_gguf_model(
    path: Path, name: str = "llama", kind: str = "F32", seed: int = 0, chat: bool = True, **changes: Any
) -> Path:
    """A GGUF file of one of FAMILIES; its matrices are of the type `kind` where blocks divide their rows."""
    family, architecture, own = FAMILIES[name]
    config, network = config_of(family, **{**own, **changes}), network_of(name, seed, **changes)
    writer = gguf.GGUFWriter(path, architecture)
    add_shape(writer, config, network)
    add_bytes(writer, network.arch.vocab_size, chat)
    arch = network.arch
    table = gguf.get_tensor_name_map(
        {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[architecture], arch.num_hidden_layers
    )
    for parameter, weight in network.named_parameters():
        module, _, part = parameter.rpartition(".")
        numbers = permuted(weight.detach(), parameter, arch).float()
        if module.endswith("norm"):
            numbers = numbers + arch.family.norm_offset
        wanted = (
            Type[kind]
            if numbers.ndim > 1 and not numbers.shape[-1] % gguf.GGML_QUANT_SIZES[Type[kind]][0]
            else Type.F32
        )
        writer.add_tensor(
            f"{table[module]}.{part}", quantized(numbers.contiguous().numpy(), wanted), raw_dtype=wanted
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_shape(writer: gguf.GGUFWriter, config: dict[str, Any], network: Llama) -> None:
    """The keys of the network, as llama.cpp's converter writes them."""
    arch = network.arch
    writer.add_context_length(arch.max_position_embeddings)
    writer.add_embedding_length(arch.hidden_size)
    writer.add_block_count(arch.num_hidden_layers)
    writer.add_feed_forward_length(arch.intermediate_size)
    writer.add_head_count(arch.num_attention_heads)
    writer.add_head_count_kv(arch.num_key_value_heads)
    writer.add_key_length(arch.head_dim)
    writer.add_value_length(arch.head_dim)
    writer.add_layer_norm_rms_eps(arch.rms_norm_eps)
    writer.add_rope_dimension_count(arch.rotary_dim or arch.head_dim)
    writer.add_rope_freq_base(arch.rope.theta)
    if arch.model_type in ("gemma2", "gemma3_text"):
        writer.add_sliding_window(config["sliding_window"])
    if arch.model_type == "gemma2":
        writer.add_attn_logit_softcapping(arch.attention_cap)
        writer.add_final_logit_softcapping(arch.logits_cap)
    if arch.model_type == "granite":
        writer.add_embedding_scale(arch.embedding_multiplier)
        writer.add_residual_scale(arch.residual_multiplier)
        writer.add_attention_scale(arch.attention_scale or arch.head_dim**-0.5)
        writer.add_logit_scale(arch.logits_divisor)
    rope, width = arch.rope, arch.rotary_dim or arch.head_dim
    if rope.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)
    if rope.kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope.factor)
        writer.add_rope_scaling_orig_ctx_len(rope.original_max_position_embeddings)
    if rope.kind == "llama3":
        turns = [
            rope.original_max_position_embeddings / (2 * math.pi * rope.theta ** (2 * at / width))
            for at in range(width // 2)
        ]
        smooth = np.clip((np.array(turns) - 1) / 3, 0, 1)
        writer.add_tensor("rope_freqs.weight", (1 / ((1 - smooth) / rope.factor + smooth)).astype(np.float32))
    if rope.kind == "longrope":
        writer.add_rope_scaling_orig_ctx_len(rope.original_max_position_embeddings)
        writer.add_rope_scaling_attn_factors(rope.attention_factor)
        writer.add_tensor("rope_factors_short.weight", np.array(rope.short_factor, np.float32))
        writer.add_tensor("rope_factors_long.weight", np.array(rope.long_factor, np.float32))


def add_bytes(writer: gguf.GGUFWriter, size: int, chat: bool = True) -> None:
    """The vocabulary of tests/tiny_models.py's byte tokenizer."""
    by_id = {number: text for text, number in byte_tokenizer().get_vocab(with_added_tokens=True).items()}
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(size)]
    kinds = [
        TokenType.UNUSED if number not in by_id else TokenType.CONTROL if number > 255 else TokenType.NORMAL
        for number in range(size)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["\u00fe \u00ff"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_add_bos_token(True)
    if chat:
        writer.add_chat_template(CHAT_TEMPLATE)
