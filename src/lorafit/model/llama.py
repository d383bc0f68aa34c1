"""The Llama-family network with Hugging Face parameter names; it knows nothing of data, adapters or files.

Shapes: everything is flat over tokens, there is no batch axis and no padding. A pass computes the tokens of one
or more documents laid end to end; `attend` says who sees whom (model/attention.py).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafit.model.architecture import Architecture, Rope
from lorafit.model.attention import Attend


class RMSNorm(nn.Module):
    """Root-mean-square norm in at least float32, scaled by a weight (Zhang and Sennrich, 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # (..., size)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, arch: Architecture, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = arch.head_dim
        self.window = arch.windows[layer] if arch.windows else None
        q_width, kv_width = arch.num_attention_heads * arch.head_dim, arch.num_key_value_heads * arch.head_dim
        self.q_proj = nn.Linear(arch.hidden_size, q_width, bias=arch.qkv_bias)
        self.k_proj = nn.Linear(arch.hidden_size, kv_width, bias=arch.qkv_bias)
        self.v_proj = nn.Linear(arch.hidden_size, kv_width, bias=arch.qkv_bias)
        self.o_proj = nn.Linear(q_width, arch.hidden_size, bias=arch.o_bias)
        self.q_norm = RMSNorm(arch.head_dim, arch.rms_norm_eps) if arch.qk_norm else None
        self.k_norm = RMSNorm(arch.head_dim, arch.rms_norm_eps) if arch.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (tokens, heads, head_dim)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (tokens, kv_heads, head_dim)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mixed: Tensor = self.o_proj(attend(self.layer, q, k, v, self.window).flatten(-2))
        return mixed


class MLP(nn.Module):
    """Gated feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(arch.hidden_size, arch.intermediate_size, bias=arch.mlp_bias)
        self.up_proj = nn.Linear(arch.hidden_size, arch.intermediate_size, bias=arch.mlp_bias)
        self.down_proj = nn.Linear(arch.intermediate_size, arch.hidden_size, bias=arch.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One decoder layer: attention and MLP, each behind a norm and added to the stream."""

    def __init__(self, arch: Architecture, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(arch, layer)
        self.mlp = MLP(arch)
        self.input_layernorm = RMSNorm(arch.hidden_size, arch.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(arch.hidden_size, arch.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    """Embedding, layers and the final norm: `model.*` in a Hugging Face checkpoint."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(arch.vocab_size, arch.hidden_size)
        self.layers = nn.ModuleList(Layer(arch, layer) for layer in range(arch.num_hidden_layers))
        self.norm = RMSNorm(arch.hidden_size, arch.rms_norm_eps)


class Llama(nn.Module):
    """A causal language model.

    `hidden` gives the stream before the final norm, `logits` applies norm and head to the rows one wants: a
    table of all tokens times the vocabulary is never needed.
    """

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.arch = arch
        self.model = Decoder(arch)
        self.lm_head = nn.Linear(arch.hidden_size, arch.vocab_size, bias=False)
        if arch.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden(self, ids: Tensor, attend: Attend) -> Tensor:
        """ids int64 (tokens,) -> the stream after the last layer (tokens, hidden_size)."""
        x: Tensor = self.model.embed_tokens(ids)
        cos, sin = rotary_table(attend.positions, self.arch.rope, self.arch.head_dim, x.dtype)
        for layer in self.model.layers:
            x = layer(x, cos, sin, attend)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Rows of `hidden` (rows, hidden_size) -> (rows, vocab_size)."""
        out: Tensor = self.lm_head(self.model.norm(hidden))
        return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on x (tokens, heads, head_dim); the two halves of a head form the pairs (Su et al., 2021)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def rotary_table(positions: Tensor, rope: Rope, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin for each position, (tokens, 1, head_dim); angles are taken in float32 as transformers does."""
    frequencies = inverse_frequencies(rope, head_dim).to(positions.device)
    angles = positions.to(torch.float32)[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians a position for each pair of a head, float32 (head_dim / 2,).

    `llama3` keeps short wavelengths, divides long ones by `factor` and blends in between, as in Meta's release
    of Llama 3.1; `linear` divides all.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        context = rope.original_max_position_embeddings
        wavelengths = 2 * math.pi / frequencies
        blend = (context / wavelengths - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        blended = (1 - blend) * frequencies / rope.factor + blend * frequencies
        long = wavelengths > context / rope.low_freq_factor
        short = wavelengths < context / rope.high_freq_factor
        return torch.where(long, frequencies / rope.factor, torch.where(short, frequencies, blended))
    return frequencies
