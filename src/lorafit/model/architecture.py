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
from lorafit.model.layer_fields import Mixers, Ropes, Sizes, Windows, rotated_part
from lorafit.model.mixer_shapes import SHAPES, DeltaHeads, MixerShape
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
    mixers: Mixers = ()  # what mixes the tokens in each layer, a key of SHAPES; empty if all layers attend
    conv_width: int = 0  # tokens that a causal convolution reads
    delta: DeltaHeads | None = None  # of the layers with a gated delta rule
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

    def mixer_kind(self, layer: int) -> str:
        """What mixes the tokens in a layer, a key of SHAPES."""
        return self.mixers[layer] if self.mixers else "attention"

    def mixer(self, layer: int) -> MixerShape:
        """The token mixer of a layer."""
        return SHAPES[self.mixer_kind(layer)](self)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The layers that attend."""
        layers = range(self.num_hidden_layers)
        return tuple(layer for layer in layers if self.mixer_kind(layer) == "attention")

    @property
    def mlp_groups(self) -> tuple[tuple[str, ...], tuple[str]]:
        """Short names of the linears of an MLP: those of its input, and that of its result."""
        name = self.family.name
        gates = (name("gate_up_proj"),) if self.family.fused_mlp else (name("gate_proj"), name("up_proj"))
        return gates, (name("down_proj"),)

    def groups(self, layer: int) -> tuple[tuple[str, ...], ...]:
        """Short names of the linears of a layer, in the order of the pass; those that share an input are together."""
        mixer = self.mixer(layer)
        return (tuple(mixer.inputs), (mixer.output,), *self.mlp_groups)

    def mixer_linears(self, layer: int) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of each linear of a layer's token mixer by its short name."""
        mixer = self.mixer(layer)
        shapes = {name: (width, self.hidden_size) for name, width in mixer.inputs.items()}
        return {**shapes, mixer.output: (self.hidden_size, mixer.width)}

    @property
    def mlp_linears(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of each linear of an MLP by its short name."""
        hidden, inner = self.hidden_size, self.intermediate_size
        gates, (down,) = self.mlp_groups
        return {**{name: (2 * inner // len(gates), hidden) for name in gates}, down: (hidden, inner)}

    def linears(self, layer: int) -> list[tuple[str, tuple[int, int]]]:
        """The short name and (out_features, in_features) of each linear of a layer, in the order of the pass."""
        return [*self.mixer_linears(layer).items(), *self.mlp_linears.items()]

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
        layers = range(self.num_hidden_layers)
        return sum(out * width for layer in layers for _, (out, width) in self.linears(layer))

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole network; tied embeddings count once."""
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        head_norms = {"none": 0, "width": q + kv}.get(self.family.qk_norm, 2 * self.head_dim)
        attending = head_norms + (q + 2 * kv) * self.qkv_bias + self.hidden_size * self.o_bias
        each = self.hidden_size * (4 if self.family.norms == "around" else 2)
        each += (2 * self.intermediate_size + self.hidden_size) * self.mlp_bias
        other = self.num_hidden_layers * each + len(self.attention_layers) * attending
        other += sum(self.mixer(layer).weights for layer in range(self.num_hidden_layers))
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_linear_weights + other + tables + self.hidden_size


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
    other_names = {ours: given[name] for name, ours in family.aliases.items() if given.get(name) is not None}
    fields = Fields({**family.defaults, **given, **other_names}, place)
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
    more = {"intermediate_size": fields.count(family.inner_size), **family.more(fields, sizes)}
    if more.get("attention_scale") == head_dim**-0.5:
        del more["attention_scale"]
    rotary_dim = rotated_part(fields, head_dim) if family.partial_rotary else head_dim
    architecture = Architecture(
        model_type=str(model_type),
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden_size,
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
        mixers=family.mixers(fields, num_layers),
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
    return len(arch.attention_layers) * arch.num_attention_heads * arch.head_dim / weights
