"""Small models and rows that tests build for themselves: random networks of every family, a byte tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor

from lorafit.model.adapter_file import adapter_files, adapter_tensors
from lorafit.model.architecture import parse_architecture
from lorafit.model.llama import Llama
from lorafit.model.lora import LoraSpec, adapted, attach

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

_BASE: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 256,
    "eos_token_id": 257,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 16},
    "llama3": {
        "model_type": "llama",
        "num_key_value_heads": 1,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "llama-linear": {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama-yarn": {
        "model_type": "llama",
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    },
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 16},
    "mistral-window": {"model_type": "mistral", "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
}
# Types whose checkpoints tests/model/test_published.py makes with transformers, in its format: a new one is a line.
_LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.5, 2.0, 2.5, 3.0, 3.5, 4.0],
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
PUBLISHED: dict[str, dict[str, Any]] = {
    "smollm3": {"model_type": "smollm3", "tie_word_embeddings": True, "no_rope_layers": [1, 0]},
    "gemma3": {
        "model_type": "gemma3_text",
        "tie_word_embeddings": True,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 5,
    },
    "gemma2": {
        "model_type": "gemma2",
        "tie_word_embeddings": True,
        "sliding_window": 5,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 3.0,
    },
    "phi3": {"model_type": "phi3", "sliding_window": 20, "hidden_size": 64},
    "phi3-longrope": {
        "model_type": "phi3",
        "hidden_size": 64,
        "partial_rotary_factor": 0.75,
        "rope_scaling": _LONGROPE,
        "original_max_position_embeddings": 20,
        "tie_word_embeddings": True,
    },
    "olmo2": {"model_type": "olmo2"},
    "olmo3": {
        "model_type": "olmo3",
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 5,
        "rope_theta": 500000.0,
        "rope_scaling": {**_YARN, "attention_factor": 1.2},
    },
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.2,
        "logits_scaling": 8.0,
        "tie_word_embeddings": True,
    },
    "granite4": {
        "model_type": "granitemoehybrid",
        "layer_types": ["attention", "attention"],
        "num_local_experts": 0,
        "mamba_n_heads": 2,
        "shared_intermediate_size": 48,
        "position_embedding_type": "rope",
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.25,
        "attention_multiplier": 0.1,
        "logits_scaling": 6.0,
        "tie_word_embeddings": True,
    },
    "ministral3": {
        "model_type": "ministral3",
        "rope_parameters": {
            **_YARN,
            "rope_theta": 1000000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 16,
        },
    },
    "exaone4": {"model_type": "exaone4", "sliding_window": None, "layer_types": ["full_attention"] * 2},
    "exaone4-window": {
        "model_type": "exaone4",
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 5,
    },
    "ernie4_5": {"model_type": "ernie4_5", "tie_word_embeddings": True, "use_bias": True},
    "helium": {"model_type": "helium", "num_attention_heads": 2, "num_key_value_heads": 2},
    "lfm2": {
        "model_type": "lfm2",
        "norm_eps": 1e-4,
        "layer_types": ["conv", "full_attention"],
        "block_multiple_of": 16,
        "tie_word_embeddings": True,
    },
    "qwen3_5": {
        "model_type": "qwen3_5_text",
        "layer_types": ["linear_attention", "full_attention"],
        "partial_rotary_factor": 0.5,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
    },
    "hunyuan": {
        "model_type": "hunyuan_v1_dense",
        "rope_scaling": {"type": "dynamic", "alpha": 50.0, "factor": 1.0},
    },
}

HYBRIDS = ("lfm2", "qwen3_5")  # of PUBLISHED: not all of their layers attend


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    """The config.json of a tiny network of `family`."""
    if family in PUBLISHED:
        return {**_BASE, "head_dim": 16, "pad_token_id": 0, **PUBLISHED[family], **changes}
    return {**_BASE, **FAMILIES[family], **changes}


def random_network(
    family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Llama:
    """A tiny random network; weights are large enough that mistakes show."""
    network = Llama(parse_architecture(config_of(family, **changes), "test")).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_((1 + 0.1 * noise if "norm" in name else 0.12 * noise).to(dtype))
    return network.requires_grad_(False).eval()


def weights_of(network: Llama) -> dict[str, Tensor]:
    """The network's tensors as a checkpoint stores them."""
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def byte_tokenizer() -> Tokenizer:
    """256 bytes, BOS 256, EOS 257 and two roles; every UTF-8 text goes through it and back."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|user|>", "<|assistant|>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return tokenizer


def write_model(
    folder: Path, family: str = "llama", chat: bool = True, seed: int = 0, **changes: Any
) -> Path:
    """A whole model folder: config, weights, byte tokenizer and, with `chat`, a chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(family, **changes)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 256, "eos_token_id": 257}))
    save_file(
        weights_of(random_network(family, seed, **changes)), folder / "model.safetensors", {"format": "pt"}
    )
    return write_prompting(folder, chat)


def write_prompting(folder: Path, chat: bool = True) -> Path:
    """The byte tokenizer and, with `chat`, a chat template, beside a network."""
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        **({"chat_template": CHAT_TEMPLATE} if chat else {}),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return folder


def write_adapter(folder: Path, network: Llama, spec: LoraSpec, seed: int = 0, base: str = "base") -> Path:
    """A PEFT adapter folder for a network like this one (which is adapted by it), B not zero: it changes answers."""
    spec = attach(network, spec, seed)
    generator = torch.Generator().manual_seed(seed)
    for module in adapted(network).values():
        module.lora_B.data = 0.2 * torch.randn(module.lora_B.shape, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in adapter_files(adapter_tensors(network), spec, base, None).items():
        (folder / name).write_bytes(content)
    return folder


def write_rows(path: Path, count: int = 40) -> Path:
    """Alpaca rows of differing length, some with input."""
    rows = [
        {
            "instruction": f"Say the number {index}{' please' * (index % 4)}.",
            "input": "in words" if index % 3 == 0 else "",
            "output": f"It is {'so ' * (index % 5)}number {index}.",
        }
        for index in range(count)
    ]
    path.write_text(json.dumps(rows, indent=1))
    return path
