"""The one record of each model type that lorafit trains: all in which its networks and files differ from Llama's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lorafit.model.config_fields import Fields
from lorafit.model.layer_fields import (
    MINISTRAL_ROPE,
    Mixers,
    Ropes,
    Sizes,
    Windows,
    attention_only,
    full_attention,
    gemma,
    granite,
    granite_4,
    hunyuan_rope,
    lfm,
    lfm_mixers,
    ministral_rope,
    no_more,
    phi_rope,
    qwen,
    qwen_mixers,
    rope_if_named,
    rope_with_windows,
    ropes_by_window,
    same_rope,
    same_window,
    some_without_rope,
    text_rope,
    window_by_layer,
    window_by_pattern,
    window_without_rope,
)


@dataclass(frozen=True, slots=True)
class Family:
    """All that is specific to one `model_type`; the rest is read from config.json in the same way for all.

    A bool is the same for all models of the type; a name is the field of config.json that decides.
    """

    gguf: str | None = None  # llama.cpp's name of the architecture; None where it has none
    # llama.cpp rotates neighbouring rows of q and k, not halves of a head
    gguf_interleaved_rope: bool = False
    gguf_qkv_bias: bool = True  # llama.cpp has biases of q, k and v
    # llama.cpp knows the layers that differ by their number only: the last of each so many; 0 if all are alike
    gguf_period: int = 0
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    tie_word_embeddings: bool | str = "tie_word_embeddings"
    windows: Callable[[Fields, int], Windows] = full_attention
    mixers: Callable[[Fields, int], Mixers] = attention_only
    ropes: Callable[[Fields, Sizes], Ropes] = same_rope
    more: Callable[[Fields, Sizes], Mapping[str, Any]] = no_more  # further fields of the Architecture
    # where the norms of a branch stand: before it, after it (before it is added), or both
    norms: Literal["before", "after", "around"] = "before"
    # the norms of q and k: of each head, of each head after its rotation, or of all heads together
    qk_norm: Literal["none", "head", "rotated_head", "width"] = "none"
    gated_attention: bool = False  # q_proj gives a gate of each head's output too
    norm_offset: float = 0.0  # norms multiply by this plus their weight
    activation: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    rounds_embedding_multiplier: bool = False  # to the type of the weights
    fused_qkv: bool = False  # one linear `qkv_proj`
    fused_mlp: bool = False  # one linear `gate_up_proj`
    inner_size: str = "intermediate_size"  # the field with the width of the MLP
    names: Mapping[str, str] = field(default_factory=dict)  # its names of modules, by ours
    partial_rotary: bool = False  # `partial_rotary_factor` of a head is rotated
    interleaved_rotary: bool = False  # neighbours in a head form a pair, not its halves
    fits_float16: bool = True  # activations stay below 65,504
    aliases: Mapping[str, str] = field(
        default_factory=dict
    )  # its names of fields that others have: ours by its own
    keys: tuple[str, ...] = ()  # keys of config.json that it uses and others refuse
    defaults: Mapping[str, Any] = field(default_factory=dict)  # transformers' values of absent fields

    def name(self, ours: str) -> str:
        """Its name of the module that most families call `ours`."""
        return self.names.get(ours, ours)


_GEMMA = Family(
    more=gemma,
    norms="around",
    norm_offset=1.0,
    activation="gelu_pytorch_tanh",
    rounds_embedding_multiplier=True,
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    fits_float16=False,
)
_GEMMA_DEFAULTS: dict[str, Any] = {
    "tie_word_embeddings": True,
    "head_dim": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 4096,
}
_OLMO = Family(norms="after", qk_norm="width", qkv_bias="attention_bias", o_bias="attention_bias")
_GRANITE = Family(
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    mlp_bias="mlp_bias",
    more=granite,
)
FAMILIES: dict[str, Family] = {
    "llama": Family(
        gguf="llama",
        gguf_interleaved_rope=True,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "mistral": Family(
        gguf="llama",
        gguf_interleaved_rope=True,
        windows=same_window,
    ),
    "qwen2": Family(
        gguf="qwen2",
        qkv_bias=True,
        windows=window_by_layer,
    ),
    "qwen3": Family(
        gguf="qwen3",
        gguf_qkv_bias=False,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm="head",
        windows=window_by_layer,
    ),
    "smollm3": Family(
        gguf="smollm3",
        gguf_interleaved_rope=True,
        gguf_period=4,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
        windows=window_without_rope,
        ropes=some_without_rope,
        defaults={
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2000000.0,
        },
    ),
    "gemma3_text": replace(
        _GEMMA,
        qk_norm="head",
        windows=window_by_pattern(6, "sliding_window_pattern"),
        ropes=ropes_by_window("rope_local_base_freq"),
        defaults={
            **_GEMMA_DEFAULTS,
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "rope_theta": 1000000.0,
        },
    ),
    "gemma2": replace(
        _GEMMA,
        windows=window_by_pattern(2),
        defaults={
            **_GEMMA_DEFAULTS,
            "vocab_size": 256000,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "phi3": Family(
        windows=same_window,
        ropes=phi_rope,
        fused_qkv=True,
        fused_mlp=True,
        partial_rotary=True,
        keys=("partial_rotary_factor",),
        defaults={
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
        },
    ),
    "olmo2": replace(_OLMO, gguf="olmo2", gguf_qkv_bias=False, defaults={"rms_norm_eps": 1e-5}),
    "olmo3": replace(
        _OLMO,
        windows=window_by_pattern(4),
        ropes=ropes_by_window(500000.0),
        defaults={"rms_norm_eps": 1e-5, "sliding_window": 4096, "rope_theta": 500000.0},
    ),
    "granite": replace(_GRANITE, gguf="granite", gguf_interleaved_rope=True),
    "granitemoehybrid": replace(
        _GRANITE,
        ropes=rope_if_named,
        more=granite_4,
        fused_mlp=True,
        mlp_bias=False,
        names={"mlp": "shared_mlp", "gate_up_proj": "input_linear", "down_proj": "output_linear"},
        inner_size="shared_intermediate_size",
        defaults={"shared_intermediate_size": 1024},
    ),
    "ministral3": Family(
        windows=same_window,
        ropes=ministral_rope,
        defaults={
            "rms_norm_eps": 1e-5,
            "head_dim": 128,
            "num_key_value_heads": 8,
            "max_position_embeddings": 262144,
            "rope_parameters": MINISTRAL_ROPE,
        },
    ),
    "exaone4": Family(
        norms="after",
        qk_norm="head",
        windows=window_by_pattern(4, "sliding_window_pattern"),
        ropes=rope_with_windows,
        defaults={"rms_norm_eps": 1e-5, "num_key_value_heads": 32, "sliding_window": 4096},
    ),
    "ernie4_5": Family(
        qkv_bias="use_bias",
        o_bias="use_bias",
        mlp_bias="use_bias",
        interleaved_rotary=True,
        defaults={
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "head_dim": 128,
            "num_key_value_heads": 2,
            "max_position_embeddings": 131072,
            "rope_theta": 500000.0,
        },
    ),
    "helium": Family(
        qkv_bias="attention_bias",
        mlp_bias="mlp_bias",
        interleaved_rotary=True,
        defaults={
            "rms_norm_eps": 1e-8,
            "head_dim": 128,
            "num_key_value_heads": 20,
            "max_position_embeddings": 4096,
            "rope_theta": 100000.0,
        },
    ),
    "hunyuan_v1_dense": Family(
        gguf="hunyuan-dense",
        gguf_qkv_bias=False,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm="rotated_head",
        ropes=hunyuan_rope,
        names={"q_norm": "query_layernorm", "k_norm": "key_layernorm"},
        defaults={"rms_norm_eps": 1e-5},
    ),
    "lfm2": Family(
        gguf="lfm2",
        qk_norm="head",
        mixers=lfm_mixers,
        more=lfm,
        names={
            "mlp": "feed_forward",
            "gate_proj": "w1",
            "up_proj": "w3",
            "down_proj": "w2",
            "o_proj": "out_proj",
            "q_norm": "q_layernorm",
            "k_norm": "k_layernorm",
            "input_layernorm": "operator_norm",
            "post_attention_layernorm": "ffn_norm",
            "norm": "embedding_norm",
        },
        aliases={
            "norm_eps": "rms_norm_eps",
            "block_ff_dim": "intermediate_size",
            "tie_embedding": "tie_word_embeddings",
        },
        defaults={
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "intermediate_size": 12288,
            "num_key_value_heads": 8,
            "max_position_embeddings": 128000,
            "rope_theta": 1000000.0,
            "block_auto_adjust_ff_dim": True,
            "block_multiple_of": 256,
            "conv_L_cache": 3,
        },
    ),
    "qwen3_5_text": Family(
        gguf="qwen35",
        gguf_qkv_bias=False,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm="head",
        gated_attention=True,
        norm_offset=1.0,
        mixers=qwen_mixers,
        more=qwen,
        ropes=text_rope,
        partial_rotary=True,
        keys=("partial_rotary_factor",),
        defaults={
            "head_dim": 256,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "partial_rotary_factor": 0.25,
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
        },
    ),
}


# Types of networks with towers for images or sound, which lorafit leaves out: the types of their text model. The first
# is that of a `text_config` without a type.
WRAPPERS: dict[str, tuple[str, ...]] = {
    "gemma3": ("gemma3_text",),
    "mistral3": ("mistral", "ministral3"),
    "qwen3_5": ("qwen3_5_text",),
}
