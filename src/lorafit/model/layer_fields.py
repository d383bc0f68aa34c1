"""What the fields of a config.json say about the layers of a network, for the records in model/families.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorafit.hub.folder_keys import Rule
from lorafit.model.config_fields import Fields
from lorafit.model.mixer_shapes import DeltaHeads
from lorafit.model.rope import Rope, read_rope, read_ropes_by_type

Windows = tuple[int | None, ...]  # the sliding window of each layer, None for full attention
Ropes = tuple[Rope | None, ...]  # the Rope of each layer, None for none
Mixers = tuple[
    str, ...
]  # what mixes the tokens in each layer, see model/mixer_shapes.py; empty for attention alone
FULL, SLIDING = "full_attention", "sliding_attention"


def full_attention(fields: Fields, num_layers: int) -> Windows:
    """No layer has a window."""
    return (None,) * num_layers


def attention_only(fields: Fields, num_layers: int) -> Mixers:
    """Every layer attends."""
    return ()


def lfm_mixers(fields: Fields, num_layers: int) -> Mixers:
    """LFM2: `layer_types`, or `full_attn_idxs` with the numbers of the layers that attend; the others convolve."""
    kinds = fields.layers("layer_types", num_layers, (FULL, "conv"))
    if kinds is None:
        attending = fields.raw.get("full_attn_idxs")
        attending = range(num_layers) if attending is None else attending
        if not isinstance(attending, list | range) or any(
            each not in range(num_layers) for each in attending
        ):
            fields.wrong("full_attn_idxs", f"expected numbers below {num_layers}")
            return ()
        kinds = [FULL if layer in attending else "conv" for layer in range(num_layers)]
    return tuple("attention" if kind == FULL else "conv" for kind in kinds)


def qwen_mixers(fields: Fields, num_layers: int) -> Mixers:
    """Qwen3.5: `layer_types`, or attention in the last of each `full_attention_interval` layers."""
    kinds = fields.layers("layer_types", num_layers, (FULL, "linear_attention"))
    if kinds is None:
        every = fields.count("full_attention_interval", default=4)
        kinds = ["" if (layer + 1) % every else FULL for layer in range(num_layers)]
    return tuple("attention" if kind == FULL else "delta" for kind in kinds)


def same_window(fields: Fields, num_layers: int) -> Windows:
    """Every layer has the window `sliding_window`, if it is set."""
    if fields.raw.get("sliding_window") is None:
        return full_attention(fields, num_layers)
    return (fields.count("sliding_window"),) * num_layers


def window_by_layer(fields: Fields, num_layers: int) -> Windows:
    """`layer_types` names the layers with a window, else `max_window_layers` is the first of them."""
    if fields.raw.get("sliding_window") is None:
        return full_attention(fields, num_layers)
    window = fields.count("sliding_window")
    if not fields.flag("use_sliding_window"):
        return full_attention(fields, num_layers)
    kinds = fields.raw.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == num_layers:
        return tuple(window if kind == SLIDING else None for kind in kinds)
    first = fields.count("max_window_layers", default=28)
    return tuple(window if layer >= first else None for layer in range(num_layers))


def window_by_pattern(every: int, name: str = "") -> Callable[[Fields, int], Windows]:
    """`layer_types` names the layers with a window; else each layer has one but the last of each `every`.

    The field `name`, a number or a word with a letter per layer, has precedence over `every`.
    """

    def windows(fields: Fields, num_layers: int) -> Windows:
        if fields.raw.get("sliding_window") is None:
            return full_attention(fields, num_layers)
        window, period = fields.count("sliding_window"), every
        if (kinds := fields.layers("layer_types", num_layers, (FULL, SLIDING))) is not None:
            return tuple(window if kind == SLIDING else None for kind in kinds)
        if name and fields.raw.get(name) is not None:
            pattern = fields.raw[name]
            period = len(pattern) if isinstance(pattern, str) and pattern else fields.count(name)
        return tuple(window if (layer + 1) % period else None for layer in range(num_layers))

    return windows


def window_without_rope(fields: Fields, num_layers: int) -> Windows:
    """SmolLM3: if windows are used, `layer_types` names the layers, else those without rotary positions have one."""
    if fields.raw.get("sliding_window") is None or not fields.flag("use_sliding_window"):
        return full_attention(fields, num_layers)
    window = fields.count("sliding_window")
    if (kinds := fields.layers("layer_types", num_layers, (FULL, SLIDING))) is not None:
        return tuple(window if kind == SLIDING else None for kind in kinds)
    return tuple(None if has_rope else window for has_rope in _has_rope(fields, num_layers))


def _has_rope(fields: Fields, num_layers: int) -> Sequence[bool]:
    """`no_rope_layers` has a 1 for a layer with rotary positions; else every `no_rope_layer_interval`-th has none."""
    given = fields.raw.get("no_rope_layers")
    if given is not None:
        if isinstance(given, list) and len(given) >= num_layers and all(each in (0, 1) for each in given):
            return [bool(each) for each in given[:num_layers]]
        fields.wrong("no_rope_layers", f"expected a 1 or a 0 for each of {num_layers} layers")
    every = fields.count("no_rope_layer_interval", default=4)
    return [(layer + 1) % every != 0 for layer in range(num_layers)]


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the functions of a Family get beside the fields."""

    num_layers: int
    hidden_size: int
    head_dim: int
    context: int  # max_position_embeddings
    windows: Windows


def same_rope(fields: Fields, sizes: Sizes) -> Ropes:
    """Every layer has the same rotary positions."""
    return (read_rope(fields, sizes.head_dim, sizes.context),) * sizes.num_layers


def some_without_rope(fields: Fields, sizes: Sizes) -> Ropes:
    (rope, *_) = same_rope(fields, sizes)
    return tuple(rope if has_rope else None for has_rope in _has_rope(fields, sizes.num_layers))


def rope_with_windows(fields: Fields, sizes: Sizes) -> Ropes:
    """EXAONE 4: if some layers have windows, the others have no rotary positions."""
    (rope, *_) = same_rope(fields, sizes)
    if fields.raw.get("sliding_window") is None:
        return (rope,) * sizes.num_layers
    return tuple(None if window is None else rope for window in sizes.windows)


def ropes_by_window(local: str | float) -> Callable[[Fields, Sizes], Ropes]:
    """Layers with a window have a base of their own: `local`, or the field of this name with the default 10,000."""

    def ropes(fields: Fields, sizes: Sizes) -> Ropes:
        theta = fields.raw.get(local, 10000.0) if isinstance(local, str) else local
        full, sliding = read_ropes_by_type(fields, sizes.head_dim, sizes.context, theta)
        return tuple(full if window is None else sliding for window in sizes.windows)

    return ropes


def text_rope(fields: Fields, sizes: Sizes) -> Ropes:
    """Qwen3.5: a part of each head is rotated. Of a text all three positions of `mrope_section` are the same."""
    width = rotated_part(fields, sizes.head_dim)
    used: Rule = "used"
    keys = dict.fromkeys(("partial_rotary_factor", "mrope_section", "mrope_interleaved"), used)
    return (read_rope(fields, width, sizes.context, keys=keys),) * sizes.num_layers


def phi_rope(fields: Fields, sizes: Sizes) -> Ropes:
    """Phi-3: its names of `longrope`, and a part of each head that is rotated."""
    width = rotated_part(fields, sizes.head_dim)
    keys: dict[str, Rule] = {"partial_rotary_factor": "used"}
    aliases = {"su": "longrope", "yarn": "longrope"}
    return (read_rope(fields, width, sizes.context, aliases, keys),) * sizes.num_layers


MINISTRAL_ROPE: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def ministral_rope(fields: Fields, sizes: Sizes) -> Ropes:
    """Ministral 3: `llama_4_scaling_beta` scales queries by their position."""
    keys: dict[str, Rule] = {"llama_4_scaling_beta": "used", "max_position_embeddings": "used"}
    return (read_rope(fields, sizes.head_dim, sizes.context, keys=keys),) * sizes.num_layers


def hunyuan_rope(fields: Fields, sizes: Sizes) -> Ropes:
    """Hunyuan: `dynamic` with `alpha` is a fixed base."""
    return (read_rope(fields, sizes.head_dim, sizes.context, keys={"alpha": "used"}),) * sizes.num_layers


def rope_if_named(fields: Fields, sizes: Sizes) -> Ropes:
    """Granite 4: rotary positions only with `position_embedding_type: rope`."""
    kind = fields.raw.get("position_embedding_type")
    if kind not in (None, "rope", "nope"):
        fields.wrong("position_embedding_type", "expected rope or nope")
    return same_rope(fields, sizes) if kind == "rope" else (None,) * sizes.num_layers


def rotated_part(fields: Fields, head_dim: int) -> int:
    """The numbers of a head that are rotated: `partial_rotary_factor` of them."""
    scaling = fields.raw.get("rope_parameters")
    inner = scaling if isinstance(scaling, dict) and "partial_rotary_factor" in scaling else fields.raw
    part = Fields(inner, fields.place)
    factor = part.number("partial_rotary_factor", 1.0)
    width = int(head_dim * factor)
    if not 0 < factor <= 1 or width % 2 or not width:
        part.wrong("partial_rotary_factor", "expected a part of a head that is an even number of numbers")
        width = head_dim
    fields.problems += part.problems
    return width


def no_more(fields: Fields, sizes: Sizes) -> Mapping[str, Any]:
    return {}


def lfm(fields: Fields, sizes: Sizes) -> Mapping[str, Any]:
    """LFM2: the width of the MLP is two thirds of the field, rounded up to a multiple, unless it is exact already."""
    inner = fields.count("intermediate_size")
    if fields.flag("block_auto_adjust_ff_dim"):
        multiple = fields.count("block_multiple_of")
        inner = int(fields.number("block_ffn_dim_multiplier", 1.0) * int(2 * inner / 3))
        inner = -(-inner // multiple) * multiple
    return {"intermediate_size": inner, "conv_width": fields.count("conv_L_cache", limit=64)}


def qwen(fields: Fields, sizes: Sizes) -> Mapping[str, Any]:
    """Qwen3.5: the heads of the delta rule."""
    heads = DeltaHeads(
        keys=fields.count("linear_num_key_heads"),
        values=fields.count("linear_num_value_heads"),
        key_dim=fields.count("linear_key_head_dim"),
        value_dim=fields.count("linear_value_head_dim"),
    )
    if heads.values % heads.keys:
        fields.wrong("linear_num_key_heads", "it must divide linear_num_value_heads")
    return {"delta": heads, "conv_width": fields.count("linear_conv_kernel_dim", limit=64)}


def granite(fields: Fields, sizes: Sizes) -> Mapping[str, Any]:
    """Granite's four multipliers."""
    return {
        "embedding_multiplier": fields.number("embedding_multiplier", 1.0),
        "residual_multiplier": fields.number("residual_multiplier", 1.0),
        "attention_scale": fields.number("attention_multiplier", 1.0),
        "logits_divisor": fields.number("logits_scaling", 1.0),
    }


def granite_4(fields: Fields, sizes: Sizes) -> Mapping[str, Any]:
    """Dense Granite 4; the hybrids have layers of another kind, and experts."""
    name = "layers_block_type" if "layers_block_type" in fields.raw else "layer_types"
    kinds = fields.raw.get(name)
    if not isinstance(kinds, list) or any(kind not in ("attention", FULL) for kind in kinds):
        hint = "the dense ones are granite-4.0-350m and granite-4.0-1b"
        fields.wrong(name, "only layers of the type attention are supported", hint)
    if fields.raw.get("num_local_experts", 8) != 0:
        fields.wrong("num_local_experts", "networks with experts are not supported")
    return granite(fields, sizes)


def gemma(fields: Fields, sizes: Sizes) -> Mapping[str, Any]:
    """The scale of scores, the caps, and embeddings times the root of their width."""

    def cap(name: str) -> float:
        return 0.0 if fields.raw.get(name) is None else fields.number(name, 1.0)

    if fields.raw.get("use_bidirectional_attention"):
        fields.wrong("use_bidirectional_attention", "only causal attention is supported")
    return {
        "embedding_multiplier": math.sqrt(sizes.hidden_size),
        "attention_scale": fields.number("query_pre_attn_scalar", 256.0) ** -0.5,
        "attention_cap": cap("attn_logit_softcapping"),
        "logits_cap": cap("final_logit_softcapping"),
    }
