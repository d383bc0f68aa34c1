"""The Llama-family network with Hugging Face parameter names; it does not know data, adapters or files.

Shapes: everything is flat over tokens, without a batch axis and without padding. A pass computes the tokens of one
or more consecutive documents; `attend` defines which tokens attend to which (model/attention.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorafit.model.architecture import Architecture, Rope
from lorafit.model.attention import Attend, Rotary
from lorafit.model.decode_linear import head
from lorafit.model.linear import Linear
from lorafit.model.lora_linear import Identity, RmsNormInput, SwigluInput, project
from lorafit.model.memory import MUCH_FREE, release_free_memory
from lorafit.model.ops import norm


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis with a frozen weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # (..., size)
        return norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, arch: Architecture, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = arch.head_dim
        self.window = arch.windows[layer] if arch.windows else None
        q_width, kv_width = arch.num_attention_heads * arch.head_dim, arch.num_key_value_heads * arch.head_dim
        self.q_proj = Linear(arch.hidden_size, q_width, bias=arch.qkv_bias)
        self.k_proj = Linear(arch.hidden_size, kv_width, bias=arch.qkv_bias)
        self.v_proj = Linear(arch.hidden_size, kv_width, bias=arch.qkv_bias)
        self.o_proj = Linear(q_width, arch.hidden_size, bias=arch.o_bias)
        self.q_norm = RMSNorm(arch.head_dim, arch.rms_norm_eps) if arch.qk_norm else None
        self.k_norm = RMSNorm(arch.head_dim, arch.rms_norm_eps) if arch.qk_norm else None

    def forward(
        self, x: Tensor, before: RmsNormInput, rotary: Rotary, attend: Attend, keys: Tensor | None = None
    ) -> Tensor:
        """The concatenated outputs of the heads, (tokens, heads * head_dim), before `o_proj`."""
        projected = project((self.q_proj, self.k_proj, self.v_proj), before, x, keys=keys)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in projected)  # (tokens, heads, head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return attend(self.layer, q, k, v, rotary, self.window).flatten(-2)


class MLP(nn.Module):
    """Gated feed-forward: x + down(silu(gate(norm(x))) * up(norm(x)))."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.gate_proj = Linear(arch.hidden_size, arch.intermediate_size, bias=arch.mlp_bias)
        self.up_proj = Linear(arch.hidden_size, arch.intermediate_size, bias=arch.mlp_bias)
        self.down_proj = Linear(arch.intermediate_size, arch.hidden_size, bias=arch.mlp_bias)

    def forward(self, x: Tensor, before: RmsNormInput, keys: Tensor | None = None) -> Tensor:
        gate, up = project((self.gate_proj, self.up_proj), before, x, keys=keys)
        return project((self.down_proj,), SwigluInput(), gate, up, residual=x, keys=keys)[0]


class Layer(nn.Module):
    """One decoder layer: attention and MLP, each after a norm, added to the residual stream."""

    def __init__(self, arch: Architecture, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(arch, layer)
        self.mlp = MLP(arch)
        self.input_layernorm = RMSNorm(arch.hidden_size, arch.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(arch.hidden_size, arch.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        attend: Attend,
        rows: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        """x (tokens, hidden_size) -> the same, or only `rows` of it, which attend to all tokens."""
        mixed = self.self_attn(x, _normed(self.input_layernorm), rotary, attend, keys)
        if rows is not None:
            mixed, x = mixed[rows], x[rows]
            keys = None if keys is None else keys[rows]
        x = project((self.self_attn.o_proj,), Identity(), mixed, residual=x, keys=keys)[0]
        out: Tensor = self.mlp(x, _normed(self.post_attention_layernorm), keys)
        return out


def _normed(before: RMSNorm) -> RmsNormInput:
    return RmsNormInput(before.weight, before.eps)


class _Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Does nothing: weights come from files, and random ones on `meta` would make torch load its compiler."""


class _Head(nn.Linear):
    def reset_parameters(self) -> None:
        """Does nothing, as above."""


class Decoder(nn.Module):
    """Embedding, layers and the final norm: `model.*` in a Hugging Face checkpoint."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.embed_tokens = _Embedding(arch.vocab_size, arch.hidden_size)
        self.layers = nn.ModuleList(Layer(arch, layer) for layer in range(arch.num_hidden_layers))
        self.norm = RMSNorm(arch.hidden_size, arch.rms_norm_eps)


class Llama(nn.Module):
    """A causal language model.

    `hidden` is the residual stream before the final norm; `logits` applies norm and head to selected rows, so there is
    never a table of all tokens times the vocabulary. With `recompute` a layer saves only its input for the backward
    pass and computes the rest again (gradient checkpointing).
    """

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.arch = arch
        self.model = Decoder(arch)
        self.lm_head = _Head(arch.hidden_size, arch.vocab_size, bias=False)
        self.recompute = False
        self.changed: dict[
            str, tuple[nn.Parameter, nn.Parameter]
        ] = {}  # by an adapter: the base's weight, its own
        if arch.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden(
        self, ids: Tensor, attend: Attend, rows: Tensor | None = None, keys: Tensor | None = None
    ) -> Tensor:
        """ids int64 (tokens,) -> the stream after the last layer (tokens, hidden_size), or `rows` of it.

        `keys` int64 (tokens,) identify the tokens for dropout, whatever their position in the pass.
        """
        x: Tensor = self.model.embed_tokens(ids)
        lengths = None if self.arch.rope.fixed_up_to is None else attend.lengths_seen()
        rotary = rotary_table(attend.positions, self.arch.rope, self.arch.head_dim, lengths)
        last = len(self.model.layers) - 1
        for number, layer in enumerate(self.model.layers):
            inputs = (x, rotary, attend, rows if number == last else None, keys)
            x = checkpoint(layer, *inputs, use_reentrant=False) if self.recompute else layer(*inputs)
            if torch.is_grad_enabled():  # saved tensors lie between freed ones: the peak would grow
                release_free_memory(MUCH_FREE)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Rows of `hidden` (rows, hidden_size) -> (rows, vocab_size)."""
        return head(self.model.norm(hidden), self.lm_head.weight)


def rotary_table(positions: Tensor, rope: Rope, head_dim: int, lengths: Tensor | None = None) -> Rotary:
    """Cosine and sine of each token's angles, (tokens, head_dim / 2), in float32 as in transformers.

    `lengths` int64 (tokens,) are the lengths of the tokens' texts, for angles that depend on them.
    """
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
