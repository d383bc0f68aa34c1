"""Networks with an adapter on any device, their packs and their steps: for tests/gpu and benchmarks/gpu.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from tests.tiny_models import random_network
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from lorafit.data.packing import Pack, Packer, TokenRow
from lorafit.forward import pack_loss
from lorafit.model.adamw import AdamW
from lorafit.model.architecture import Architecture, parse_architecture
from lorafit.model.attention import way_on_device
from lorafit.model.linear import Frozen, Linear, replace_module
from lorafit.model.llama import Llama
from lorafit.model.lora import LoraSpec, attach
from lorafit.model.offload import LayerStream, move_to_host
from lorafit.model.places import GROUP
from lorafit.model.quant import QUANTIZERS, Quantize
from lorafit.plan.cost_model import (
    PassCost,
    Shape,
    base_bytes,
    num_trainable,
    saved_bytes,
    working_bytes,
)

Gradients = dict[str, Tensor]
TINYLLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 256,
    "eos_token_id": 257,
}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 16


def numbers(x: Tensor) -> Tensor:
    """The numbers of a tensor of any device, on the CPU."""
    x = x.detach()
    inner: Any = x.inner  # a simulated device's; else torch's inner product
    return inner if isinstance(inner, Tensor) else x.cpu()


def network_on(
    device: str,
    family: str,
    dtype: torch.dtype,
    quantize: Quantize = "none",
    dropout: float = 0.0,
    *,
    dequantized: bool = False,
    targets: tuple[str, ...] = ("all-linear",),
    offload: bool = False,
    variant: str = "lora",
    **changes: Any,
) -> Llama:
    """The same small adapted network on any device, with B not zero; `changes` are of its config.

    With `dequantized`, weights are what the quantised ones stand for, in `dtype`.
    """
    network = random_network(family, dtype=dtype, **changes)
    if dequantized:
        for module in network.modules():
            if isinstance(module, Linear):
                there = QUANTIZERS[quantize](module.weight.detach().to(torch.bfloat16).to("cuda"))
                module.weight.data = numbers(there.dequantize()).to(dtype)
        quantize = "none"
    for module in network.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = torch.nn.Parameter(weight.detach().to(device), requires_grad=False)
    if network.arch.tie_word_embeddings:
        network.lm_head.weight = network.decoder.embed_tokens.weight
    if quantize != "none":
        for name, module in list(network.named_modules()):
            if isinstance(module, Linear):
                quantized = QUANTIZERS[quantize](module.weight.detach())
                quantized.bias = module.bias
                replace_module(network, name, quantized)
    if offload:
        leave_on_host(network)
    attach(network, LoraSpec(4, 8, dropout, targets, False, variant), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("lora_B"):
                noise = torch.randn(parameter.shape, generator=generator) * 0.05
                parameter.copy_(noise.to(parameter.device))
    return network.train()


def leave_on_host(network: Llama) -> None:
    """Offload the layers of a network on CUDA."""
    for module in network.modules():
        move_to_host(module)
    network.streamed = LayerStream(list(network.decoder.layers), network.lm_head.weight.device)


def small_packs(capacity: int = 90) -> Sequence[Pack]:
    """Two packs by default. Some rows of the first begin alike, all of one with another."""
    random = np.random.default_rng(3)
    head = random.integers(0, 256, 12)
    rows = []
    for length, shared in ((30, 12), (28, 12), (13, 9), (13, 0), (40, 12)):
        ids = random.integers(0, 256, length)
        ids[:shared] = head[:shared]
        rows.append((ids.astype(np.uint16), np.arange(length) >= length // 2))
    return Packer(capacity).packs(rows)


def few_tokens(shared: int, lengths: Sequence[int] = (6, 3, 4)) -> Sequence[Pack]:
    """One pass of few tokens: the interpreter is slow. `shared` tokens begin its rows."""
    random = np.random.default_rng(3)
    head, rows = random.integers(0, 256, shared), []
    for length in lengths:
        ids = random.integers(0, 256, length)
        ids[:shared] = head
        rows.append((ids.astype(np.uint16), np.arange(length) >= shared))
    return Packer(64).packs(rows)


def measure(
    network: Llama, packs: Sequence[Pack] | None = None, scale: float = 1.0
) -> tuple[float, Gradients]:
    """Loss and gradients of a step, those of the loss times `scale` divided by it."""
    torch.manual_seed(5)
    network.zero_grad()
    total = 0.0
    for pack in packs or small_packs():
        loss = pack_loss(network, pack)
        (loss * (scale / 100)).backward()
        total += float(loss.detach())
    parameters = network.named_parameters()
    return total, {n: numbers(p.grad).double() / scale for n, p in parameters if p.grad is not None}


def difference(one: tuple[float, Gradients], other: tuple[float, Gradients]) -> tuple[float, float]:
    """(Relative difference of two losses, largest relative difference of their gradients)."""
    assert one[1].keys() == other[1].keys()
    gradients = (
        float((one[1][name] - gradient).norm() / gradient.norm().clamp(min=1e-12))
        for name, gradient in other[1].items()
    )
    return abs(one[0] - other[0]) / abs(other[0]), max(gradients)


def empty_network(
    config: dict[str, Any],
    dtype: torch.dtype,
    quantize: Quantize = "none",
    dropout: float = 0.0,
    *,
    offload: bool = False,
) -> Llama:
    """An adapted network with random weights, made on CUDA."""
    with torch.device("meta"):
        network = Llama(parse_architecture(config, "test"))
    for name, parameter in list(network.named_parameters()):
        weight = torch.empty(parameter.shape, dtype=dtype, device="cuda")
        weight.normal_(1.0 if "norm" in name else 0.0, 0.02)
        parent, _, child = name.rpartition(".")
        module = network.get_submodule(parent)
        if quantize != "none" and isinstance(module, Frozen) and child == "weight":
            replace_module(network, parent, QUANTIZERS[quantize](weight))
        else:
            setattr(module, child, torch.nn.Parameter(weight, requires_grad=False))
    if offload:
        leave_on_host(network)
    attach(network.requires_grad_(False), LoraSpec(RANK, 32, dropout, ("all-linear",), False), 0)
    return network.train()


def rows_of(num_tokens: int, mean: int = 150, prefix: int = 1, vocab: int = 32000) -> list[TokenRow]:
    """Rows of `num_tokens` together, about `mean` each; 60 % of a row is trained, and the first `prefix` tokens of all
    are the same.
    """
    random = np.random.default_rng(0)
    head, rows, left = random.integers(3, vocab, prefix), [], num_tokens
    while left > 0:
        length = int(min(left, max(8 + prefix, random.normal(mean, mean / 3 if mean < 1000 else 0))))
        length = left if left - length < 8 + prefix else length
        ids = random.integers(3, vocab, length)
        ids[:prefix] = head[:length]
        rows.append((ids.astype(np.uint32), np.arange(length) >= int(length * 0.4)))
        left -= length
    return rows


def train_step(network: Llama, optimizer: AdamW, packs: Sequence[Pack]) -> list[Tensor]:
    """One optimizer step as the loop computes it; the losses stay on the device."""
    supervised, losses = sum(len(pack.targets) for pack in packs), []
    for pack in packs:
        loss = pack_loss(network, pack)
        (loss * (1 / supervised)).backward()
        losses.append(loss.detach())
    clip_grad_norm_(optimizer.parameters, 1.0)
    optimizer.step(1e-4)
    optimizer.zero_grad()
    return losses


def trainable(network: Llama) -> Iterable[torch.nn.Parameter]:
    return (parameter for parameter in network.parameters() if parameter.requires_grad)


def shape_of(arch: Architecture, dtype: torch.dtype, quantize: Quantize = "none", **changes: Any) -> Shape:
    """The plan's shape of `empty_network`."""
    adapted = (frozenset(LINEARS),) * arch.num_hidden_layers
    attention = way_on_device(torch.device("cuda"), dtype, arch.head_dim)
    given = {"dropout": False, "recompute": False, "attention": attention, **changes}
    return Shape(arch, dtype.itemsize, quantize, adapted, RANK, **given)


def planned_bytes(shape: Shape, pack: Pack) -> float:
    """What the plan expects at the peak of a step on a GPU, without the libraries."""
    work = cost_of(pack)
    return (
        base_bytes(shape) + 12 * num_trainable(shape) + saved_bytes(shape, work) + working_bytes(shape, work)
    )


def cost_of(pack: Pack) -> PassCost:
    """What a pack costs, exactly."""
    lengths = np.array(pack.lengths)
    repeated, padding = lengths.sum() - len(pack.ids), (-lengths % GROUP).sum()
    return PassCost(*map(float, (len(pack.ids), len(pack.targets), repeated, padding)))
