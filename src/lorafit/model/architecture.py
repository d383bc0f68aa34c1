"""What a `config.json` says about a network: one frozen description for llama, mistral, qwen2 and qwen3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.errors import ModelError, Problem
from lorafit.storage.safe_read import MB, read_json

MAX_CONFIG = 16 * MB
MAX_PARAMETERS = 10**13
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding: base frequency and how it is stretched (`default`, `linear`, `llama3`)."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


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
    windows: tuple[int | None, ...] = ()  # sliding window of each layer, None for full attention

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole network, embeddings once where they are tied."""
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        layer = self.hidden_size * (2 * q + 2 * kv) + 3 * self.hidden_size * self.intermediate_size
        layer += 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        layer += (q + 2 * kv) * self.qkv_bias + self.hidden_size * self.o_bias
        layer += (2 * self.intermediate_size + self.hidden_size) * self.mlp_bias
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + tables + self.hidden_size


def read_architecture(folder: Path) -> Architecture:
    """The Architecture of a model folder. Raises ModelError naming each field that cannot be used."""
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
    """The Architecture that a parsed config.json describes; `place` is where errors point."""
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ModelError(
            f"model type `{model_type}` is not supported",
            place=place,
            hint=f"lorafit trains {', '.join(MODEL_TYPES)}",
        )
    fields = _Fields(raw, place)
    num_layers = fields.count("num_hidden_layers", limit=1000)
    num_heads = fields.count("num_attention_heads")
    hidden_size = fields.count("hidden_size")
    architecture = Architecture(
        model_type=model_type,
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.count("intermediate_size"),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=fields.count("num_key_value_heads", default=num_heads),
        head_dim=fields.count("head_dim", default=max(1, hidden_size // num_heads)),
        rms_norm_eps=fields.number("rms_norm_eps", default=1e-6),
        max_position_embeddings=fields.count("max_position_embeddings", default=2048),
        rope=_rope(fields),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=model_type == "qwen2" or (model_type != "mistral" and fields.flag("attention_bias")),
        o_bias=model_type in ("llama", "qwen3") and fields.flag("attention_bias"),
        mlp_bias=model_type == "llama" and fields.flag("mlp_bias"),
        qk_norm=model_type == "qwen3",
        windows=_windows(fields, model_type, num_layers),
    )
    if raw.get("hidden_act", "silu") != "silu":
        fields.wrong("hidden_act", "only `silu` is supported")
    if architecture.num_attention_heads % architecture.num_key_value_heads:
        fields.wrong("num_key_value_heads", "it must divide num_attention_heads")
    if architecture.head_dim % 2:
        fields.wrong("head_dim", "it must be even")
    if raw.get("quantization_config"):
        fields.wrong("quantization_config", "the checkpoint is quantised; give the 16-bit original")
    if architecture.num_parameters > MAX_PARAMETERS:
        message = f"config.json describes a network of {architecture.num_parameters:,} parameters"
        fields.problems.append(Problem(message, place))
    fields.check()
    return architecture


class _Fields:
    """Reads typed fields and collects what is wrong with them."""

    def __init__(self, raw: Mapping[str, Any], place: str) -> None:
        self.raw, self.place = raw, place
        self.problems: list[Problem] = []

    def wrong(self, name: str, why: str) -> None:
        value = repr(self.raw.get(name))
        self.problems.append(Problem(f"`{name}` is {value[:60]}: {why}", self.place))

    def count(self, name: str, default: int | None = None, limit: int = 10_000_000) -> int:
        value = self.raw.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= limit:
            self.wrong(name, f"expected a whole number from 1 to {limit}")
            return 1
        return value

    def number(self, name: str, default: float) -> float:
        value = self.raw.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
            self.wrong(name, "expected a positive number")
            return default
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.raw.get(name) or False
        if not isinstance(value, bool):
            self.wrong(name, "expected true or false")
        return bool(value)

    def check(self) -> None:
        if self.problems:
            raise ModelError.of(self.problems)


def _rope(fields: _Fields) -> Rope:
    """Rope from `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before)."""
    name = "rope_parameters" if fields.raw.get("rope_parameters") else "rope_scaling"
    scaling = fields.raw.get(name) or {}
    if not isinstance(scaling, dict):
        fields.wrong(name, "expected an object")
        return Rope()
    inner = _Fields({"rope_theta": fields.raw.get("rope_theta", 10000.0), **scaling}, fields.place)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    rope = Rope(
        theta=inner.number("rope_theta", 10000.0),
        kind=kind if isinstance(kind, str) else "",
        factor=inner.number("factor", 1.0),
        low_freq_factor=inner.number("low_freq_factor", 1.0),
        high_freq_factor=inner.number("high_freq_factor", 4.0),
        original_max_position_embeddings=inner.count("original_max_position_embeddings", 8192),
    )
    if rope.kind not in ("default", "linear", "llama3"):
        fields.wrong(name, "rope types default, linear and llama3 are supported")
    fields.problems += inner.problems
    return rope


def _windows(fields: _Fields, model_type: str, num_layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer, as transformers decides it."""
    full: tuple[int | None, ...] = (None,) * num_layers
    if fields.raw.get("sliding_window") is None or model_type == "llama":
        return full
    window = fields.count("sliding_window")
    if model_type == "mistral":
        return (window,) * num_layers
    if not fields.flag("use_sliding_window"):
        return full
    kinds = fields.raw.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == num_layers:
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    first = fields.count("max_window_layers", default=28)
    return tuple(window if layer >= first else None for layer in range(num_layers))


def attention_cost(arch: Architecture) -> float:
    """What a pair of tokens of one row costs beside one token: the multiplications of causal attention beside those
    of all weights.
    """
    heads = arch.num_attention_heads * arch.head_dim
    keys = arch.num_key_value_heads * arch.head_dim
    layer = arch.hidden_size * (2 * heads + 2 * keys + 3 * arch.intermediate_size)
    weights = arch.num_hidden_layers * layer + arch.hidden_size * arch.vocab_size
    return arch.num_hidden_layers * heads / weights
