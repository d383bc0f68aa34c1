"""What mixes the tokens of a layer, by its shapes: attention or another way. model/mixers.py computes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorafit.model.architecture import Architecture


@dataclass(frozen=True, slots=True)
class DeltaHeads:
    """The heads of a gated delta rule. Those of queries and keys are `keys`; several of `values` share one of them."""

    keys: int
    values: int
    key_dim: int
    value_dim: int

    @property
    def channels(self) -> int:
        """Numbers of a token's queries, keys and values."""
        return 2 * self.keys * self.key_dim + self.values * self.value_dim


@dataclass(frozen=True, slots=True)
class MixerShape:
    """A token mixer: linears of the layer's input, what it does with their outputs, and one linear of the result."""

    module: str  # its name in the layer
    inputs: Mapping[str, int]  # the linears of its input, with their widths
    output: str  # the linear of its result
    width: int  # of what that linear reads
    parts: int = 1  # tensors of that width of which it is made: a gate is one
    weights: int = 0  # parameters of its own, beside linears, biases and norms of heads
    states: tuple[tuple[int, ...], ...] = ()  # the shapes that decoding keeps per row, beside keys and values


def attention(arch: Architecture) -> MixerShape:
    """Grouped-query attention."""
    family = arch.family
    q, kv = arch.num_attention_heads * arch.head_dim, arch.num_key_value_heads * arch.head_dim
    parts = 2 if family.gated_attention else 1
    own = {"q_proj": parts * q, "k_proj": kv, "v_proj": kv}
    inputs = {"qkv_proj": q + 2 * kv} if family.fused_qkv else own
    return MixerShape("self_attn", inputs, family.name("o_proj"), q, parts)


def conv(arch: Architecture) -> MixerShape:
    """A gated short convolution (LFM2): two gates and the channels come from one linear."""
    hidden, taps = arch.hidden_size, arch.conv_width
    state = (taps - 1, hidden)
    return MixerShape("conv", {"in_proj": 3 * hidden}, "out_proj", hidden, 2, taps * hidden, (state,))


def delta(arch: Architecture) -> MixerShape:
    """A gated delta rule behind a convolution (Qwen3.5): z gates its result, b is the step and a the decay."""
    heads = arch.delta
    assert heads is not None
    inner = heads.values * heads.value_dim
    inputs = {
        "in_proj_qkv": heads.channels,
        "in_proj_z": inner,
        "in_proj_b": heads.values,
        "in_proj_a": heads.values,
    }
    weights = arch.conv_width * heads.channels + 2 * heads.values + heads.value_dim
    states = (arch.conv_width - 1, heads.channels), (heads.values, heads.key_dim, heads.value_dim)
    return MixerShape("linear_attn", inputs, "out_proj", inner, 2, weights, states)


SHAPES: dict[str, Callable[[Architecture], MixerShape]] = {
    "attention": attention,
    "conv": conv,
    "delta": delta,
}
