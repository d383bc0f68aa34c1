"""The shape of a network, and how it is read from a `config.json`. The record of each type is in model/families.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.errors import ModelError, Problem
from lorafit.hub.folder_keys import CONFIG, refused
from lorafit.model.config_fields import Fields
from lorafit.model.families import FAMILIES, WRAPPERS, Family
from lorafit.model.layer_fields import Ropes, Sizes, Windows, rotated_part
from lorafit.model.rope import Rope
from lorafit.storage.safe_read import MB, read_json

MAX_CONFIG = 16 * MB
MAX_PARAMETERS = 10**13


@dataclass(frozen=True, slots=True)
class Architecture:
    """A Llama-like network; fields are named as in Hugging Face's config.json. `family` has the rest."""

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
    rope: Rope  # that of the layers with full attention
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    windows: Windows = ()
    ropes: Ropes = ()  # that of each layer, if layers differ; None: the layer has no rotary positions
    rotary_dim: int | None = None  # the numbers of a head that are rotated; None for all
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0  # of what each branch adds
    attention_scale: float | None = None  # of scores; None for 1 / sqrt(head_dim)
    logits_divisor: float = 1.0
    attention_cap: float = 0.0  # a score s becomes cap * tanh(s / cap); 0 for none
    logits_cap: float = 0.0
    is_wrapped: bool = False  # the text model of a network with towers for images or sound

    @property
    def family(self) -> Family:
        """The record of the model type."""
        return FAMILIES[self.model_type]

    @property
    def prefix(self) -> str:
        """What the names of all weights begin with, but those of the head."""
        return "model.language_model." if self.is_wrapped else "model."

    @property
    def embedding(self) -> str:
        """The full name of the embedding."""
        return f"{self.prefix}embed_tokens"

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Short names of the linears of a layer, in the order of the pass; those that share an input are together."""
        family = self.family
        own = family.names
        return (
            ("qkv_proj",) if family.fused_qkv else ("q_proj", "k_proj", "v_proj"),
            ("o_proj",),
            (own.get("gate_up_proj", "gate_up_proj"),) if family.fused_mlp else ("gate_proj", "up_proj"),
            (own.get("down_proj", "down_proj"),),
        )

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of each linear of a layer by its short name, in the order of the pass."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        inputs, (output,), gates, (down,) = self.groups
        widths = (q, kv, kv) if len(inputs) == 3 else (q + 2 * kv,)
        shapes = {name: (width, hidden) for name, width in zip(inputs, widths, strict=True)}
        shapes[output] = (hidden, q)
        shapes |= {name: (2 * inner // len(gates), hidden) for name in gates}
        shapes[down] = (hidden, inner)
        return shapes

    @property
    def shortest_window(self) -> int:
        """Tokens of the longest text in which no window hides a token."""
        return min([self.max_position_embeddings, *(window for window in self.windows if window is not None)])

    @property
    def fixed_up_to(self) -> int | None:
        """Tokens of the longest text whose angles do not depend on its length; None if they never do."""
        lengths = [rope.fixed_up_to for rope in (self.rope, *self.ropes) if rope is not None]
        return min((length for length in lengths if length is not None), default=None)

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row that is trained: angles that depend on the row's length cannot be shared."""
        return self.fixed_up_to or self.max_position_embeddings

    @property
    def num_linear_weights(self) -> int:
        """Weights of all linears of all layers; no bias, embedding or head."""
        return self.num_hidden_layers * sum(out * width for out, width in self.linears.values())

    @property
    def norm_widths(self) -> tuple[int, ...]:
        """The width of each norm of a layer."""
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        of_heads = {"none": (), "width": (q, kv)}.get(self.family.qk_norm, (self.head_dim,) * 2)
        return (self.hidden_size,) * (4 if self.family.norms == "around" else 2) + of_heads

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole network; tied embeddings count once."""
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        other = sum(self.norm_widths)
        other += (q + 2 * kv) * self.qkv_bias + self.hidden_size * self.o_bias
        other += (2 * self.intermediate_size + self.hidden_size) * self.mlp_bias
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_linear_weights + self.num_hidden_layers * other + tables + self.hidden_size


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
    given, text, is_wrapped = raw, raw, raw.get("model_type") in WRAPPERS
    if is_wrapped:
        text = _text_config(raw, place)
        given = {"tie_word_embeddings": raw.get("tie_word_embeddings", True), **text}
    model_type = text.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ModelError(
            f"model type `{model_type}` is not supported",
            place=place,
            hint=f"lorafit trains {', '.join(FAMILIES)}",
        )
    fields = Fields({**family.defaults, **given}, place)
    num_layers = fields.count("num_hidden_layers", limit=1000)
    num_heads = fields.count("num_attention_heads")
    hidden_size = fields.count("hidden_size")
    head_dim = fields.count("head_dim", default=max(1, hidden_size // num_heads))
    context = fields.count("max_position_embeddings", default=2048)
    windows = family.windows(fields, num_layers)
    sizes = Sizes(num_layers, hidden_size, head_dim, context, windows)
    ropes = family.ropes(fields, sizes)
    full = [rope for rope, window in zip(ropes, windows, strict=True) if rope is not None and window is None]
    rope = next(iter(full or filter(None, ropes)), Rope())
    more = dict(family.more(fields, sizes))
    if more.get("attention_scale") == head_dim**-0.5:
        del more["attention_scale"]
    rotary_dim = rotated_part(fields, head_dim) if family.partial_rotary else head_dim
    architecture = Architecture(
        model_type=str(model_type),
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.count(family.inner_size),
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
        windows=windows,
        ropes=() if all(each == rope for each in ropes) else ropes,
        rotary_dim=None if rotary_dim == head_dim else rotary_dim,
        is_wrapped=is_wrapped,
        **more,
    )
    activation = next((name for name in ("hidden_activation", "hidden_act") if fields.raw.get(name)), "")
    if fields.raw.get(activation, family.activation) != family.activation:
        fields.wrong(activation, f"only `{family.activation}` is supported")
    if architecture.num_attention_heads % architecture.num_key_value_heads:
        fields.wrong("num_key_value_heads", "it must divide num_attention_heads")
    if architecture.head_dim % 2:
        fields.wrong("head_dim", "it must be even")
    fields.problems += refused(text, {**CONFIG, **dict.fromkeys(family.keys, "used")}, place)
    if any(part.get("quantization_config") for part in (raw, text)):
        hint = "give the 16-bit original, and an adapter on it: lorafit generate 16-BIT-BASE --adapter FOLDER"
        Fields.wrong(
            quantized := Fields(raw, place), "quantization_config", "the checkpoint is quantised", hint
        )
        fields.problems += quantized.problems
    if architecture.num_parameters > MAX_PARAMETERS:
        message = f"config.json describes a network of {architecture.num_parameters:,} parameters"
        fields.problems.append(Problem(message, place))
    fields.check()
    return architecture


def _text_config(raw: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    """The config of the text model in that of a network with other towers."""
    types, text = WRAPPERS[str(raw["model_type"])], raw.get("text_config")
    if not isinstance(text, dict):
        raise ModelError("`text_config` is no object", place=place)
    text = {"model_type": types[0], **text}
    if text["model_type"] not in types:
        message = f"`text_config` has the model type `{text['model_type']}`, which is not supported"
        raise ModelError(
            message, place=place, hint=f"of {raw['model_type']}, lorafit trains {', '.join(types)}"
        )
    return text


def _context(context: int, rope: Rope) -> int:
    """Tokens that the network reads; config.json often has the length before scaling for `dynamic` and `yarn`."""
    if rope.kind not in ("dynamic", "yarn"):
        return context
    return max(context, int(rope.original_max_position_embeddings * rope.factor))


def attention_cost(arch: Architecture) -> float:
    """The cost of one pair of tokens of a row, relative to one token: multiplications of causal attention divided by
    those of all weights.
    """
    weights = arch.num_linear_weights + arch.hidden_size * arch.vocab_size
    return arch.num_hidden_layers * arch.num_attention_heads * arch.head_dim / weights
