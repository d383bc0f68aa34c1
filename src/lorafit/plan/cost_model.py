"""The memory of a pass by arithmetic: bytes kept for the backward pass, bytes alive for a moment, bytes of the base.

The counts follow the hand-written forward and backward of model/lora_linear.py, model/attention.py and model/loss.py.
Tests compare them with what autograd keeps, and with the peak of a step on a fake GPU. No tensor is created.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorafit.forward import FILL
from lorafit.model.architecture import Architecture
from lorafit.model.attention import Way
from lorafit.model.compile import num_blocks
from lorafit.model.lora import VARIANTS
from lorafit.model.loss import chunk_bytes
from lorafit.model.quant import QUANTIZERS, Quantize

_COPIES = 6  # in float32, of a block of rows, in the gradient of a gated activation


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides the memory of a pass.

    `width` is bytes per number of the compute type, `adapted` the short names of the adapted linears of each layer,
    `attention` how documents attend. `rank` is a mean where linears differ. `tables` are the trained numbers of
    embedding and head, and the numbers of their copies. With `offload` two layers are on the device at a time.
    """

    arch: Architecture
    width: int
    quantize: Quantize
    adapted: tuple[frozenset[str], ...]
    rank: float
    dropout: bool
    recompute: bool
    attention: Way
    variant: str = "lora"
    tables: tuple[int, int] = (0, 0)
    offload: bool = False

    @property
    def on_gpu(self) -> bool:
        """Whether the pass runs on CUDA."""
        return self.attention in ("flash", "batches")

    @property
    def wide(self) -> int:
        """Bytes per number of a sum."""
        return max(4, self.width)


@dataclass(frozen=True, slots=True)
class PassCost:
    """One pack: its input tokens, where a shared prefix counts once, and its supervised predictions.

    On a GPU attention has a shared token once per document: `repeated` are those beyond `tokens`. `padding` is what
    rounds documents up where similar ones form batches.
    """

    tokens: float
    supervised: float
    repeated: float = 0.0
    padding: float = 0.0

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
            # flash attention keeps its output itself, which is this input, unless tokens were laid apart
            keeps_output = shape.attention == "flash" and not work.repeated and layer < len(shape.adapted) - 1
            is_kept = keeps_output and arch.mixer_kind(layer) == "attention" and made_of == 1
            keeps_input = names != mixer_output or made_of > 1 or (ranks and not is_kept)
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
    lse = arch.num_attention_heads * 4
    if shape.attention == "batches":  # keys and values are repeated to as many heads as the queries have
        total = (work.filled + work.repeated + work.padding) * (4 * q * width + lse)
    else:
        own_output = 0 if shape.attention == "kernel" else q  # torch's attention keeps its output
        laid_apart = work.repeated if shape.on_gpu else 0.0
        total = (work.filled + laid_apart) * ((q + 2 * kv + own_output) * width + lse)
    is_apart = arch.family.interleaved_rotary or arch.rotary_dim is not None or bool(arch.rope.query_beta)
    if arch.family.qk_norm != "none" and (shape.attention != "kernel" or is_apart):
        # a norm keeps its input and one number per head, or per token, where the kernel does not norm again
        heads = 2 if arch.family.qk_norm == "width" else arch.num_attention_heads + arch.num_key_value_heads
        total += work.filled * ((q + kv) * width + heads * 4)
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
    arch = shape.arch
    last = arch.num_hidden_layers - 1
    middle = max(0, last - 1)
    layer = _layer_working_bytes(shape, work, middle)
    if shape.recompute:
        layer += layer_saved_bytes(shape, work, middle)
    elif (
        shape.on_gpu and middle < last
    ):  # the last layer comes first, with fewer rows, and gives back what it saved
        layer -= layer_saved_bytes(shape, work, last)
        layer = max(layer, _layer_working_bytes(shape, work, last))
    most, bytes_per_logit = chunk_bytes(shape.width, shape.on_gpu)
    loss = min(most, work.supervised * arch.vocab_size * bytes_per_logit)
    loss += work.supervised * arch.hidden_size * 2 * shape.width
    return max(layer, loss)


def _layer_working_bytes(shape: Shape, work: PassCost, layer: int) -> float:
    """Temporary bytes of a layer's backward pass."""
    arch, width = shape.arch, shape.width
    rows = _rows(arch, work, layer)
    # down_proj: the gradients of its output, of the residual stream and of its input, the recomputed input, one of up's
    total = rows * width * (2 * arch.hidden_size + 3 * arch.intermediate_size)
    quantized = 0.0
    if shape.quantize != "none":
        down = arch.mlp_linears[arch.mlp_groups[1][0]]
        quantized = QUANTIZERS[shape.quantize].working_bytes(rows, *down, width, shape.on_gpu)
    if (
        shape.on_gpu
    ):  # one gradient of the residual stream less, but operations make copies, after the product
        numbers = rows * arch.intermediate_size
        blocks = num_blocks(round(numbers))
        copies = numbers / blocks * (_COPIES * shape.wide + (2 * width if blocks > 1 else 0))
        total += max(copies, quantized) - rows * width * arch.hidden_size
    else:
        total += quantized
    if shape.dropout:
        total += rows * width * arch.intermediate_size  # the input with what is left of it
    if arch.family.fused_mlp:
        total += rows * width * arch.intermediate_size  # the gradient of both halves in one
    return total


def base_bytes(shape: Shape) -> float:
    """Bytes of the frozen base on the device."""
    linears, scale_width = shape.arch.num_linear_weights, 0.0
    rest = (shape.arch.num_parameters - linears + shape.tables[1]) * shape.width
    if not shape.offload:
        return linears * _weight_width(shape) + rest
    if shape.quantize != "none":
        scale_width = QUANTIZERS[shape.quantize].scale_bytes_per_weight
    layers = streamed_bytes(shape)
    return max(layers[::2]) + max(layers[1::2], default=0.0) + linears * scale_width + rest


def streamed_bytes(shape: Shape) -> list[float]:
    """Bytes of each layer that model/offload.py keeps in the host's memory."""
    width = _weight_width(shape)
    if shape.quantize != "none":
        width -= QUANTIZERS[shape.quantize].scale_bytes_per_weight
    layers = range(shape.arch.num_hidden_layers)
    return [width * sum(math.prod(sizes) for _, sizes in shape.arch.linears(layer)) for layer in layers]


def copied_bytes(shape: Shape) -> float:
    """Bytes that a pass, forward and backward, copies to the device with `offload`: what the buffers hold at the turn,
    and at the end of the pass before, is not copied again.
    """
    layers = streamed_bytes(shape)
    last = len(layers) - 1
    # the backward pass ends there
    lowest = next((layer for layer, names in enumerate(shape.adapted) if names), len(layers))
    kept = {lowest, lowest - 1 if lowest else 1}
    forward = [size for layer, size in enumerate(layers) if not (layer < 2 and layer in kept)]
    backward = [size for layer, size in enumerate(layers) if max(0, lowest - 1) <= layer < last - 1]
    return sum(forward) + sum(backward)


def _weight_width(shape: Shape) -> float:
    return shape.width if shape.quantize == "none" else QUANTIZERS[shape.quantize].bytes_per_weight


def num_trainable(shape: Shape) -> int:
    """Parameters of the adapter."""
    layers = [dict(shape.arch.linears(layer)) for layer in range(shape.arch.num_hidden_layers)]
    pairs = zip(layers, shape.adapted, strict=True)
    trained = sum(shape.rank * sum(linears[name]) for linears, names in pairs for name in names)
    return shape.tables[0] + round(trained)
