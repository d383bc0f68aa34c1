"""The Llama-family network with Hugging Face parameter names; it does not know data, adapters or files.

Shapes: everything is flat over tokens, without a batch axis and without padding. A pass computes the tokens of one
or more consecutive documents; `attend` defines which tokens attend to which (model/attention.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorafit.model.architecture import Architecture
from lorafit.model.attention import Attend, Rotary
from lorafit.model.decode_linear import MOST_ROWS, head
from lorafit.model.definitions import wide
from lorafit.model.lora_linear import GegluInput, Identity, InputOp, RmsNormInput, SwigluInput, project
from lorafit.model.memory import MUCH_FREE, release_free_memory
from lorafit.model.mixers import MIXERS, RMSNorm, add_linears, linears_of
from lorafit.model.offload import LayerStream
from lorafit.model.ops import add_scaled
from lorafit.model.rope import Rope


class MLP(nn.Module):
    """Gated feed-forward: down(activation(gate(norm(x))) * up(norm(x)))."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.inputs, self.outputs = arch.mlp_groups
        self.widths = (arch.intermediate_size, arch.intermediate_size)
        self.activation = SwigluInput() if arch.family.activation == "silu" else GegluInput()
        add_linears(self, arch.mlp_linears.items(), bias=arch.mlp_bias)

    def forward(
        self, x: Tensor, before: InputOp, residual: Tensor | None = None, keys: Tensor | None = None
    ) -> Tensor:
        """x (tokens, hidden_size) -> the same, plus `residual`."""
        gate, up = project(linears_of(self, self.inputs), before, x, keys=keys, widths=self.widths)
        down = linears_of(self, self.outputs)
        return project(down, self.activation, gate, up, residual=residual, keys=keys)[0]


class Layer(nn.Module):
    """One decoder layer: token mixer and MLP, each with norms before or after it, added to the residual stream."""

    def __init__(self, arch: Architecture, layer: int) -> None:
        super().__init__()
        shape = arch.mixer(layer)
        self.mixer_name, self.output = shape.module, shape.output
        mixer: Any = MIXERS[arch.mixer_kind(layer)](arch, layer)
        self.add_module(self.mixer_name, mixer)
        self.mlp_name = arch.family.name("mlp")
        self.add_module(self.mlp_name, MLP(arch))
        # the norms of both branches: before the branch, and after it
        self.before, self.after = (
            [arch.family.name(norm) for norm in norms] for norms in NORMS[arch.family.norms]
        )
        self.multiplier = arch.residual_multiplier
        self.is_plain = not self.after and self.multiplier == 1  # a branch is added by its last product
        for name in (*self.before, *self.after):
            self.add_module(name, RMSNorm(arch.hidden_size, arch))
        self.fused: Any = None  # the same on a GPU, if model/fused_layer.py has merged its linears

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        attend: Attend,
        rows: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        """x (tokens, hidden_size) -> the same, or only `rows` of it, which are mixed with all tokens."""
        if self.fused is not None and self.fused.runs(x, attend):
            fused: Tensor = self.fused(x, rotary, attend, rows)
            return fused
        mixer = getattr(self, self.mixer_name)
        mixed = mixer(x, self._before(0), rotary, attend, keys)
        if rows is not None:
            mixed, x = tuple(part[rows] for part in mixed), x[rows]
            keys = None if keys is None else keys[rows]
        residual = x if self.is_plain else None
        output = linears_of(mixer, [self.output])
        (out,) = project(output, mixer.result, *mixed, residual=residual, keys=keys)
        x = out if self.is_plain else self._added(x, out, 0)
        out = getattr(self, self.mlp_name)(x, self._before(1), x if self.is_plain else None, keys)
        return out if self.is_plain else self._added(x, out, 1)

    def _before(self, branch: int) -> InputOp:
        if not self.before:
            return Identity()
        before: RMSNorm = getattr(self, self.before[branch])
        return RmsNormInput(before.weight, before.eps, before.offset)

    def _added(self, x: Tensor, out: Tensor, branch: int) -> Tensor:
        """The residual stream with the output of a branch."""
        if self.after:
            out = getattr(self, self.after[branch])(out)
        if x.shape[0] <= MOST_ROWS:
            return add_scaled(x, out, self.multiplier)
        return torch.add(x, out, alpha=self.multiplier)


# Names of the norms before attention and MLP, and of those after them.
NORMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "before": (("input_layernorm", "post_attention_layernorm"), ()),
    "after": ((), ("post_attention_layernorm", "post_feedforward_layernorm")),
    "around": (
        ("input_layernorm", "pre_feedforward_layernorm"),
        ("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
}


class _Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Does nothing: weights come from files, and random ones on `meta` would make torch load its compiler."""


class _Head(nn.Linear):
    def reset_parameters(self) -> None:
        """Does nothing, as above."""


class Decoder(nn.Module):
    """Embedding, layers and the final norm: `model.*` in a Hugging Face checkpoint of a text model."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.embed_tokens = _Embedding(arch.vocab_size, arch.hidden_size)
        self.layers = nn.ModuleList(Layer(arch, layer) for layer in range(arch.num_hidden_layers))
        self.norm_name = arch.family.name("norm")
        self.add_module(self.norm_name, RMSNorm(arch.hidden_size, arch))

    @property
    def final_norm(self) -> RMSNorm:
        """The norm before the head."""
        norm: RMSNorm = getattr(self, self.norm_name)
        return norm


class _Wrapper(nn.Module):
    """The place of the decoder in a network with other towers: `model.language_model.*`."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.language_model = Decoder(arch)


class Llama(nn.Module):
    """A causal language model.

    `hidden` is the residual stream before the final norm; `logits` applies norm and head to selected rows, so there is
    never a table of all tokens times the vocabulary. With `recompute` a layer saves only its input for the backward
    pass and computes the rest again (gradient checkpointing). `neftune` is the size of the noise while training, as
    forward.py adds it. Names of weights are those of transformers' class.
    """

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.arch = arch
        self.model: Any = _Wrapper(arch) if arch.is_wrapped else Decoder(arch)
        self.lm_head = _Head(arch.hidden_size, arch.vocab_size, bias=False)
        self.recompute = False
        self.streamed: LayerStream | None = None  # the layers' weights, if they are not all on the device
        self._frequencies: dict[Rope, Tensor] = {}  # on the device of the last pass
        self.neftune = 0.0
        self.changed: dict[
            str, tuple[nn.Parameter, nn.Parameter]
        ] = {}  # by an adapter: the base's weight, its own
        self.tables = nn.ModuleDict()  # trained rows of embedding and head (model/tables.py)
        self.plain_tables: tuple[Architecture, Any, Any] | None = None  # before these rows were put in
        if arch.tie_word_embeddings:
            self.lm_head.weight = self.decoder.embed_tokens.weight

    @property
    def decoder(self) -> Decoder:
        """Embedding, layers and final norm, wherever they stand."""
        decoder: Decoder = self.model.language_model if self.arch.is_wrapped else self.model
        return decoder

    def hidden(
        self,
        ids: Tensor,
        attend: Attend,
        rows: Tensor | None = None,
        keys: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """ids int64 (tokens,) -> the stream after the last layer (tokens, hidden_size), or `rows` of it.

        `keys` int64 (tokens,) identify the tokens for dropout, whatever their position in the pass. `noise`
        (tokens, hidden_size) is added to what transformers' embedding returns.
        """
        x = self.embedded(ids, noise)
        return self.through(x, attend, 0, len(self.decoder.layers), rows, keys)

    def embedded(self, ids: Tensor, noise: Tensor | None = None) -> Tensor:
        """ids int64 (tokens,) -> the stream before the first layer (tokens, hidden_size)."""
        x = self._embedded(ids)
        is_scaled = self.arch.family.rounds_embedding_multiplier  # by the embedding itself
        if noise is not None and not is_scaled:
            x = x + noise.to(x.dtype)
        if self.arch.embedding_multiplier != 1:
            x = x * embedding_multiplier(self.arch, x.dtype)
        if noise is not None and is_scaled:
            x = x + noise.to(x.dtype)
        return x

    def through(
        self,
        x: Tensor,
        attend: Attend,
        first: int,
        end: int,
        rows: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        """The stream x (tokens, hidden_size) before layer `first` -> that before layer `end`, or `rows` of it."""
        return self.through_with(self.rotary(attend, x.dtype), x, attend, first, end, rows, keys)

    def through_with(
        self,
        rotary: Sequence[Rotary],
        x: Tensor,
        attend: Attend,
        first: int,
        end: int,
        rows: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        """`through` with the angles of all layers, those of `rotary`."""
        for number, layer in enumerate(self.decoder.layers[first:end], first):
            inputs = (x, rotary[number], attend, rows if number == end - 1 else None, keys)
            if self.streamed is not None:
                self.streamed.load(number, number + 1)
            x = checkpoint(layer, *inputs, use_reentrant=False) if self.recompute else layer(*inputs)
            if self.streamed is not None:
                self.streamed.load_before_backward(number, x)
            if torch.is_grad_enabled():  # saved tensors lie between freed ones: the peak would grow
                release_free_memory(MUCH_FREE)
        return x

    def _embedded(self, ids: Tensor) -> Tensor:
        embedding = self.decoder.embed_tokens
        if not self.tables:
            return embedding(ids)  # type: ignore[no-any-return]
        for name, table in self.tables.items():
            table.show(embedding.weight if name == "embed_tokens" else self.lm_head.weight)  # type: ignore[operator]
        rows: Any = dict(self.tables.items()).get("embed_tokens")
        embedded: Tensor = embedding(ids) if rows is None else rows.embed(ids, embedding.weight)
        return embedded

    @property
    def trained_head(self) -> tuple[Tensor, Tensor | None] | None:
        """The trained rows of the head and their ids, None for all; None where it is frozen."""
        name = "embed_tokens" if self.arch.tie_word_embeddings else "lm_head"
        table: Any = dict(self.tables.items()).get(name)
        return (table.rows, table.ids) if table is not None and table.enabled else None

    def differentiable_head(self) -> Tensor:
        """The weight of the head, with a gradient for its trained rows."""
        weight = self.lm_head.weight
        if (trained := self.trained_head) is None:
            return weight
        rows, ids = trained
        return rows.to(weight.dtype) if ids is None else weight.index_copy(0, ids, rows.to(weight.dtype))

    def rotary(self, attend: Attend, dtype: torch.dtype) -> list[Rotary]:
        """The angles of each layer; layers with the same Rope share a table."""
        arch = self.arch
        lengths = None if arch.fixed_up_to is None else attend.lengths_seen()
        ropes = arch.ropes or (arch.rope,) * arch.num_hidden_layers
        tables = {rope: self._table(attend.positions, rope, lengths, dtype) for rope in set(ropes)}
        return [tables[rope] for rope in ropes]

    def _table(
        self, positions: Tensor, rope: Rope | None, lengths: Tensor | None, dtype: torch.dtype
    ) -> Rotary:
        """Cosine and sine for all pairs of a head: those that are not rotated have the angle zero.

        Another scale of scores than 1 / sqrt(head_dim) is a factor of both queries and keys.
        """
        arch = self.arch
        size = arch.head_dim if arch.rotary_dim is None else arch.rotary_dim
        if rope is None:
            cosine = torch.ones(len(positions), arch.head_dim // 2, device=positions.device)
            sine = torch.zeros_like(cosine)
        else:
            frequencies = self._frequencies.get(rope)
            if frequencies is None or frequencies.device != positions.device:
                frequencies = inverse_frequencies(rope, size).to(positions.device)  # a wait for a GPU: once
                self._frequencies[rope] = frequencies
            seen = lengths if rope.fixed_up_to else None
            cosine, sine = rotary_table(positions, rope, size, seen, frequencies)
            rest = (arch.head_dim - size) // 2
            if rest:
                cosine, sine = F.pad(cosine, (0, rest), value=1.0), F.pad(sine, (0, rest))
        if arch.attention_scale is None:
            return cosine, sine
        factor = math.sqrt(arch.attention_scale * math.sqrt(arch.head_dim))
        return cosine.to(wide(dtype)) * factor, sine.to(wide(dtype)) * factor

    def normed(self, hidden: Tensor) -> Tensor:
        """What the head multiplies, for rows of `hidden`: (rows, hidden_size)."""
        normed: Tensor = self.decoder.final_norm(hidden)
        return normed if self.arch.logits_divisor == 1 else normed / self.arch.logits_divisor

    def logits(self, hidden: Tensor) -> Tensor:
        """Rows of `hidden` (rows, hidden_size) -> (rows, vocab_size)."""
        return capped(head(self.normed(hidden), self.lm_head.weight), self.arch.logits_cap)


def capped(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap); `logits` themselves if `cap` is 0."""
    return cap * torch.tanh(logits / cap) if cap else logits


def embedding_multiplier(arch: Architecture, dtype: torch.dtype) -> Tensor | float:
    """The factor of embeddings; where transformers keeps it in the type of the weights, it is rounded to that."""
    if not arch.family.rounds_embedding_multiplier:
        return arch.embedding_multiplier
    return torch.tensor(arch.embedding_multiplier, dtype=dtype)


def rotary_table(
    positions: Tensor,
    rope: Rope,
    head_dim: int,
    lengths: Tensor | None = None,
    frequencies: Tensor | None = None,
) -> Rotary:
    """Cosine and sine of each token's angles, (tokens, head_dim / 2), in float32 as in transformers.

    `lengths` int64 (tokens,) are the lengths of the tokens' texts, for angles that depend on them. `frequencies` are
    the `inverse_frequencies` of `rope`, if they are on the device of the positions already.
    """
    if frequencies is None:
        frequencies = inverse_frequencies(rope, head_dim).to(positions.device)
    if lengths is not None:
        frequencies = _of_long_texts(frequencies, lengths, rope)
    angles = positions.to(torch.float32)[:, None] * frequencies
    if rope.attention_factor == 1:
        return angles.cos(), angles.sin()
    return angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per position for each pair of a head, float32 (head_dim / 2,); of texts up to the original length.

    `llama3` keeps the frequencies of short wavelengths, divides those of long ones by `factor` and blends between
    them, as in Meta's release of Llama 3.1; `yarn` blends by the turns within the original length; `linear` divides
    all.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    powers = rope.theta**exponents
    frequencies = 1.0 / powers
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "longrope":
        return 1.0 / (torch.tensor(rope.short_factor) * powers)
    context = rope.original_max_position_embeddings
    if rope.kind == "yarn":
        low, high = (
            head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
            for turns in (rope.beta_fast, rope.beta_slow)
        )
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        width = high - low or 0.001
        ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
        keep = 1 - ramp
        return 1.0 / (rope.factor * powers) * (1 - keep) + frequencies * keep
    if rope.kind == "llama3":
        wavelengths = 2 * math.pi / frequencies
        blend = (context / wavelengths - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        blended = (1 - blend) * frequencies / rope.factor + blend * frequencies
        long = wavelengths > context / rope.low_freq_factor
        short = wavelengths < context / rope.high_freq_factor
        return torch.where(long, frequencies / rope.factor, torch.where(short, frequencies, blended))
    return frequencies


def _of_long_texts(frequencies: Tensor, lengths: Tensor, rope: Rope) -> Tensor:
    """`frequencies` (head_dim / 2,) for tokens in texts of `lengths` int64 (tokens,): (tokens, head_dim / 2).

    Beyond the original length `longrope` has other factors, and the base of `dynamic` grows with the length.
    """
    context = rope.original_max_position_embeddings
    is_long = (lengths > context)[:, None]
    head_dim = 2 * len(frequencies)
    exponents = torch.arange(0, head_dim, 2, device=lengths.device).to(torch.float32) / head_dim
    if rope.kind == "longrope":
        long = 1.0 / (torch.tensor(rope.long_factor, device=lengths.device) * rope.theta**exponents)
    else:
        growth = rope.factor * lengths / context - (rope.factor - 1)
        base = rope.theta * growth ** (head_dim / (head_dim - 2))
        long = 1.0 / base[:, None] ** exponents
    return torch.where(is_long, long, frequencies)
