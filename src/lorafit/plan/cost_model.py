"""The memory of a pass by arithmetic: bytes kept for the backward pass, bytes alive for a moment, bytes of the base.

The counts follow the hand-written forward and backward of model/lora_linear.py, model/attention.py and model/loss.py.
A test compares them with what autograd keeps. No tensor is created.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorafit.forward import FILL
from lorafit.model.architecture import Architecture
from lorafit.model.lora import VARIANTS
from lorafit.model.loss import CHUNK_BYTES
from lorafit.model.quant import QUANTIZERS, Quantize


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides the memory of a pass.

    `width` is bytes per number of the compute type, `adapted` the short names of the adapted linears of each layer,
    `compiled` whether attention runs in the compiled kernel. `rank` is a mean where linears differ.
    """

    arch: Architecture
    width: int
    quantize: Quantize
    adapted: tuple[frozenset[str], ...]
    rank: float
    dropout: bool
    recompute: bool
    compiled: bool
    variant: str = "lora"


@dataclass(frozen=True, slots=True)
class PassCost:
    """One pack: its input tokens, where a shared prefix counts once, and its supervised predictions."""

    tokens: float
    supervised: float

    @property
    def filled(self) -> float:
        """Tokens with those that fill the pass up (forward.py)."""
        return math.ceil(self.tokens / FILL) * FILL


def _rows(arch: Architecture, work: PassCost, layer: int) -> float:
    """Rows that a layer computes after its attention: in the last layer the supervised ones only."""
    return work.supervised if layer == arch.num_hidden_layers - 1 else work.filled


def layer_saved_bytes(shape: Shape, work: PassCost, layer: int) -> float:
    """Bytes that a layer keeps for its backward pass, without `recompute`."""
    arch, adapted, total = shape.arch, shape.adapted[layer], 0.0
    linears = dict(arch.linears(layer))
    has_gradient = any(shape.adapted[:layer])  # reaches the input of these linears
    mixer = arch.mixer(layer)
    mixer_inputs, mixer_output, _, (down,) = arch.groups(layer)
    for names in arch.groups(layer):
        rows = work.filled if names == mixer_inputs else _rows(arch, work, layer)
        ranks = shape.rank * len(adapted.intersection(names))
        if has_gradient or ranks:
            made_of = {(down,): 2, mixer_output: mixer.parts}.get(names, 1)  # an activation, a gate
            inputs = linears[names[0]][1] * made_of
            keeps_input = ranks or made_of > 1 or names != mixer_output
            total += rows * (ranks + inputs * bool(keeps_input)) * shape.width
            if own := adapted.intersection(names):
                kept_inputs, kept_outputs = VARIANTS[shape.variant].kept
                kept = kept_inputs * linears[names[0]][1] + kept_outputs * sum(
                    linears[name][0] for name in own
                )
                total += rows * kept * shape.width
            if names == mixer_inputs:
                total += _KEPT[arch.mixer_kind(layer)](shape, work)
            elif names in (mixer_output, (down,)) and arch.family.norms != "before":
                total += rows * (
                    arch.hidden_size * shape.width + 4
                )  # a norm after the branch keeps its input
        has_gradient = has_gradient or ranks > 0
    return total


def _attention_bytes(shape: Shape, work: PassCost) -> float:
    arch, width = shape.arch, shape.width
    q, kv = arch.num_attention_heads * arch.head_dim, arch.num_key_value_heads * arch.head_dim
    total = work.filled * ((q + 2 * kv) * width + arch.num_attention_heads * 4)
    if arch.family.qk_norm != "none":  # each norm keeps its input and one number per head, or per token
        heads = 2 if arch.family.qk_norm == "width" else arch.num_attention_heads + arch.num_key_value_heads
        total += work.filled * ((q + kv) * width + heads * 4)
    if not shape.compiled:  # torch's attention keeps its output
        total += work.filled * q * width
    return total


def _conv_bytes(shape: Shape, work: PassCost) -> float:
    """The channels and their gate."""
    return work.filled * 2 * shape.arch.hidden_size * shape.width


def _delta_bytes(shape: Shape, work: PassCost) -> float:
    """Queries, keys and values before and after their activation; the step, and the decay with what it is made of."""
    heads = shape.arch.delta
    assert heads is not None
    return work.filled * (2 * heads.channels * shape.width + heads.values * (shape.width + 8))


# What a token mixer keeps for its backward pass, beside the inputs of its linears.
_KEPT = {"attention": _attention_bytes, "conv": _conv_bytes, "delta": _delta_bytes}


def saved_bytes(shape: Shape, work: PassCost) -> float:
    """Bytes alive when the forward pass ends: the layers', the rotary table and the gradient that the loss forms."""
    arch = shape.arch
    layers = range(arch.num_hidden_layers)
    if shape.recompute:
        kept = work.filled * arch.hidden_size * shape.width * len(layers)
    else:
        kept = sum(layer_saved_bytes(shape, work, layer) for layer in layers)
    rotary = work.filled * arch.head_dim * 4
    head = work.supervised * (2 * arch.hidden_size * shape.width + 4)  # the norm's input, the loss's gradient
    return kept + rotary + head


def working_bytes(shape: Shape, work: PassCost) -> float:
    """Temporary bytes at the peak: the backward pass of the widest layer, or the loss with its chunk of logits."""
    arch, width = shape.arch, shape.width
    middle = max(0, arch.num_hidden_layers - 2)
    rows = _rows(arch, work, middle)
    # down_proj: the gradients of its output, of the residual stream and of its input, the recomputed input, one of up's
    layer = rows * width * (2 * arch.hidden_size + 3 * arch.intermediate_size)
    if shape.dropout:
        layer += rows * width * arch.intermediate_size  # the input with what is left of it
    if arch.family.fused_mlp:
        layer += rows * width * arch.intermediate_size  # the gradient of both halves in one
    if shape.quantize != "none":
        layer += QUANTIZERS[shape.quantize].working_bytes(
            rows, *arch.mlp_linears[arch.mlp_groups[1][0]], width
        )
    if shape.recompute:
        layer += layer_saved_bytes(shape, work, middle)
    loss = min(CHUNK_BYTES, work.supervised * arch.vocab_size * width)
    loss += work.supervised * arch.hidden_size * 2 * width
    return max(layer, loss)


def base_bytes(shape: Shape) -> float:
    """Bytes of the frozen base in memory."""
    linears = shape.arch.num_linear_weights
    width = shape.width if shape.quantize == "none" else QUANTIZERS[shape.quantize].bytes_per_weight
    return linears * width + (shape.arch.num_parameters - linears) * shape.width


def num_trainable(shape: Shape) -> int:
    """Parameters of the adapter."""
    layers = [dict(shape.arch.linears(layer)) for layer in range(shape.arch.num_hidden_layers)]
    pairs = zip(layers, shape.adapted, strict=True)
    return round(sum(shape.rank * sum(linears[name]) for linears, names in pairs for name in names))
