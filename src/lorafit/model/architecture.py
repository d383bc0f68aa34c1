"""What a `config.json` says about a network, and the one record of each model type that lorafit trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lorafit.errors import ModelError, Problem
from lorafit.hub.folder_keys import CONFIG, ROPE, refused
from lorafit.storage.safe_read import MB, read_json

MAX_CONFIG = 16 * MB
MAX_PARAMETERS = 10**13
ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
Windows = tuple[int | None, ...]  # the sliding window of each layer, None for full attention


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding: the base frequency and how frequencies are scaled, by one of ROPE_KINDS.

    `attention_factor` multiplies cosine and sine. `short_factor` and `long_factor` divide the frequencies of each pair
    in texts up to the original length and beyond it (`longrope`).
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @property
    def fixed_up_to(self) -> int | None:
        """Tokens of the longest text whose angles do not depend on its length; None if they never do."""
        return self.original_max_position_embeddings if self.kind in ("dynamic", "longrope") else None


@dataclass(frozen=True, slots=True)
class Architecture:
    """A Llama-family network; fields are named as in Hugging Face's config.json."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: Rope
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: Windows = ()

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of each linear of a layer by its short name, in the order of the pass."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        attention = {
            "q_proj": (q, hidden),
            "k_proj": (kv, hidden),
            "v_proj": (kv, hidden),
            "o_proj": (hidden, q),
        }
        mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        return attention | mlp

    @property
    def shortest_window(self) -> int:
        """Tokens of the longest text in which no window hides a token."""
        return min([self.max_position_embeddings, *(window for window in self.windows if window is not None)])

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row that is trained: angles that depend on the row's length cannot be shared."""
        return self.rope.fixed_up_to or self.max_position_embeddings

    @property
    def num_linear_weights(self) -> int:
        """Weights of all linears of all layers; no bias, embedding or head."""
        return self.num_hidden_layers * sum(out * width for out, width in self.linears.values())

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole network; tied embeddings count once."""
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        other = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        other += (q + 2 * kv) * self.qkv_bias + self.hidden_size * self.o_bias
        other += (2 * self.intermediate_size + self.hidden_size) * self.mlp_bias
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_linear_weights + self.num_hidden_layers * other + tables + self.hidden_size


class Fields:
    """Reads typed fields of a config.json and collects all problems."""

    def __init__(self, raw: Mapping[str, Any], place: str) -> None:
        self.raw, self.place = raw, place
        self.problems: list[Problem] = []

    def wrong(self, name: str, why: str, hint: str = "") -> None:
        """Add a problem of the field `name`."""
        value = repr(self.raw.get(name))
        self.problems.append(Problem(f"`{name}` is {value[:60]}: {why}", self.place, hint))

    def count(self, name: str, default: int | None = None, limit: int = 10_000_000) -> int:
        """A whole number from 1 to `limit`."""
        value = self.raw.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= limit:
            self.wrong(name, f"expected a whole number from 1 to {limit}")
            return 1
        return value

    def number(self, name: str, default: float) -> float:
        """A positive number."""
        value = self.raw.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
            self.wrong(name, "expected a positive number")
            return default
        return float(value)

    def flag(self, name: bool | str) -> bool:
        """The truth value of the field `name`, false if it is absent; a bool is returned as it is."""
        value = name if isinstance(name, bool) else self.raw.get(name) or False
        if not isinstance(value, bool):
            self.wrong(str(name), "expected true or false")
        return bool(value)

    def check(self) -> None:
        """Raise ModelError with all problems, each once."""
        if self.problems:
            raise ModelError.of(dict.fromkeys(self.problems))


def full_attention(fields: Fields, num_layers: int) -> Windows:
    """No layer has a window."""
    return (None,) * num_layers


def _same_window(fields: Fields, num_layers: int) -> Windows:
    """Every layer has the window `sliding_window`, if it is set."""
    if fields.raw.get("sliding_window") is None:
        return full_attention(fields, num_layers)
    return (fields.count("sliding_window"),) * num_layers


def _window_by_layer(fields: Fields, num_layers: int) -> Windows:
    """`layer_types` names the layers with a window, else `max_window_layers` is the first of them."""
    if fields.raw.get("sliding_window") is None:
        return full_attention(fields, num_layers)
    window = fields.count("sliding_window")
    if not fields.flag("use_sliding_window"):
        return full_attention(fields, num_layers)
    kinds = fields.raw.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == num_layers:
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    first = fields.count("max_window_layers", default=28)
    return tuple(window if layer >= first else None for layer in range(num_layers))


_LLAMA_3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN_2_SPLIT = _LLAMA_3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
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
    # the regular expression of the pre-tokenizer's split, and llama.cpp's name of it
    gguf_pre_tokenizers: Mapping[str, str] = field(default_factory=dict)
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool | str = False
    tie_word_embeddings: bool | str = "tie_word_embeddings"
    windows: Callable[[Fields, int], Windows] = full_attention


FAMILIES: dict[str, Family] = {
    "llama": Family(
        gguf="llama",
        gguf_interleaved_rope=True,
        gguf_pre_tokenizers={_LLAMA_3_SPLIT: "llama-bpe"},
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "mistral": Family(
        gguf="llama",
        gguf_interleaved_rope=True,
        gguf_pre_tokenizers={_TEKKEN_SPLIT: "tekken"},
        windows=_same_window,
    ),
    "qwen2": Family(
        gguf="qwen2",
        gguf_pre_tokenizers={_QWEN_2_SPLIT: "qwen2"},
        qkv_bias=True,
        windows=_window_by_layer,
    ),
    "qwen3": Family(
        gguf="qwen3",
        gguf_qkv_bias=False,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
        windows=_window_by_layer,
    ),
}


def read_architecture(folder: Path) -> Architecture:
    """The Architecture of a model folder. Raises ModelError naming each field that lorafit cannot use."""
    path = folder / "config.json"
    try:
        raw = read_json(path, MAX_CONFIG)
    except FileNotFoundError:
        raise ModelError(
            "there is no config.json",
            place=str(folder),
            hint="a model folder holds config.json, tokenizer.json and *.safetensors",
        ) from None
    except OSError as error:
        raise ModelError(f"config.json cannot be read: {error.strerror}", place=str(path)) from None
    except ValueError:
        raise ModelError("config.json is not valid JSON", place=str(path)) from None
    if not isinstance(raw, dict):
        raise ModelError("config.json is not an object", place=str(path))
    return parse_architecture(raw, str(path))


def parse_architecture(raw: Mapping[str, Any], place: str) -> Architecture:
    """The Architecture that a parsed config.json describes; errors name `place`."""
    model_type = raw.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ModelError(
            f"model type `{model_type}` is not supported",
            place=place,
            hint=f"lorafit trains {', '.join(FAMILIES)}",
        )
    fields = Fields(raw, place)
    num_layers = fields.count("num_hidden_layers", limit=1000)
    num_heads = fields.count("num_attention_heads")
    hidden_size = fields.count("hidden_size")
    head_dim = fields.count("head_dim", default=max(1, hidden_size // num_heads))
    context = fields.count("max_position_embeddings", default=2048)
    rope = _rope(fields, head_dim, context)
    architecture = Architecture(
        model_type=str(model_type),
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.count("intermediate_size"),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=fields.count("num_key_value_heads", default=num_heads),
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", default=1e-6),
        max_position_embeddings=_context(context, rope),
        rope=rope,
        tie_word_embeddings=fields.flag(family.tie_word_embeddings),
        qkv_bias=fields.flag(family.qkv_bias),
        o_bias=fields.flag(family.o_bias),
        mlp_bias=fields.flag(family.mlp_bias),
        qk_norm=fields.flag(family.qk_norm),
        windows=family.windows(fields, num_layers),
    )
    if raw.get("hidden_act", "silu") != "silu":
        fields.wrong("hidden_act", "only `silu` is supported")
    if architecture.num_attention_heads % architecture.num_key_value_heads:
        fields.wrong("num_key_value_heads", "it must divide num_attention_heads")
    if architecture.head_dim % 2:
        fields.wrong("head_dim", "it must be even")
    if raw.get("quantization_config"):
        hint = "give the 16-bit original, and an adapter on it: lorafit generate 16-BIT-BASE --adapter FOLDER"
        fields.wrong("quantization_config", "the checkpoint is quantised", hint)
    fields.problems += refused(raw, CONFIG, place)
    if architecture.num_parameters > MAX_PARAMETERS:
        message = f"config.json describes a network of {architecture.num_parameters:,} parameters"
        fields.problems.append(Problem(message, place))
    fields.check()
    return architecture


def _context(context: int, rope: Rope) -> int:
    """Tokens that the network reads; config.json often has the length before scaling for `dynamic` and `yarn`."""
    if rope.kind not in ("dynamic", "yarn"):
        return context
    return max(context, int(rope.original_max_position_embeddings * rope.factor))


def _rope(fields: Fields, head_dim: int, context: int) -> Rope:
    """Rope from `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before), as transformers reads it.

    `context` is `max_position_embeddings`.
    """
    name = "rope_scaling" if fields.raw.get("rope_scaling") else "rope_parameters"
    scaling = fields.raw.get(name) or {}
    if not isinstance(scaling, dict):
        fields.wrong(name, "expected an object")
        return Rope()
    given = {key: value for key, value in scaling.items() if value is not None}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ROPE_KINDS:
        fields.wrong(name, f"rope types {', '.join(ROPE_KINDS)} are supported")
        return Rope()
    original = fields.raw.get("original_max_position_embeddings")
    if original is not None and kind in ("llama3", "yarn", "longrope"):
        given["original_max_position_embeddings"] = original
    if kind == "dynamic":
        given["original_max_position_embeddings"] = context
    inner = Fields({"rope_theta": fields.raw.get("rope_theta", 10000.0), **given}, fields.place)
    before = inner.count("original_max_position_embeddings", context)
    if kind in ("linear", "dynamic", "llama3") and "factor" not in given:
        inner.wrong("factor", f"rope type {kind} needs a number")
    rope = Rope(
        theta=inner.number("rope_theta", 10000.0),
        kind=kind,
        factor=inner.number("factor", context / before if kind in ("yarn", "longrope") else 1.0),
        low_freq_factor=inner.number("low_freq_factor", 1.0),
        high_freq_factor=inner.number("high_freq_factor", 4.0),
        original_max_position_embeddings=before,
        beta_fast=inner.number("beta_fast", 32.0),
        beta_slow=inner.number("beta_slow", 1.0),
        truncate=inner.flag("truncate") if "truncate" in given else True,
        short_factor=_factors(inner, "short_factor", head_dim) if kind == "longrope" else (),
        long_factor=_factors(inner, "long_factor", head_dim) if kind == "longrope" else (),
    )
    if kind == "dynamic" and head_dim < 4:
        inner.wrong("rope_type", "rope type dynamic needs heads of at least 4 numbers")
    inner.problems += refused(scaling, ROPE, f"{fields.place} {name}")
    fields.problems += inner.problems
    return replace(rope, attention_factor=inner.number("attention_factor", _attention_factor(rope, inner)))


def _factors(fields: Fields, name: str, head_dim: int) -> tuple[float, ...]:
    """A positive number for each pair of a head."""
    value = fields.raw.get(name)
    numbers = value if isinstance(value, list) else []
    if len(numbers) != head_dim // 2 or not all(type(n) in (int, float) and 0 < n < 1e12 for n in numbers):
        fields.wrong(name, f"expected {head_dim // 2} positive numbers")
    return tuple(map(float, numbers)) if not fields.problems else ()


def _attention_factor(rope: Rope, fields: Fields) -> float:
    """The factor of cosine and sine where config.json does not name it (Peng et al., 2023; Ding et al., 2024)."""
    if rope.factor <= 1:
        return 1.0
    if rope.kind == "longrope":
        return math.sqrt(1 + math.log(rope.factor) / math.log(max(2, rope.original_max_position_embeddings)))
    if rope.kind != "yarn":
        return 1.0
    above, below = (fields.raw.get(key) for key in ("mscale", "mscale_all_dim"))
    if above and below:
        above, below = fields.number("mscale", 1.0), fields.number("mscale_all_dim", 1.0)
        return (0.1 * above * math.log(rope.factor) + 1) / (0.1 * below * math.log(rope.factor) + 1)
    return 0.1 * math.log(rope.factor) + 1


def attention_cost(arch: Architecture) -> float:
    """The cost of one pair of tokens of a row, relative to one token: multiplications of causal attention divided by
    those of all weights.
    """
    weights = arch.num_linear_weights + arch.hidden_size * arch.vocab_size
    return arch.num_hidden_layers * arch.num_attention_heads * arch.head_dim / weights
