"""The formula against what autograd really keeps, tensor by tensor, and against the sizes that are known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny_models import random_network

from lorafit.data.packing import make_packs
from lorafit.forward import pack_loss
from lorafit.model.llama import Llama
from lorafit.model.lora import LoraSpec, adapted, attach
from lorafit.model.native import kernels
from lorafit.plan.cost_model import (
    PassCost,
    Shape,
    base_bytes,
    forward_flops,
    num_trainable,
    saved_bytes,
    training_flops,
    working_bytes,
)

LENGTHS = (40, 25, 9)
WIDER = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 3}


def network_and_shape(
    family: str, targets: tuple[str, ...], dtype: torch.dtype, dropout: float = 0.0, recompute: bool = False
) -> tuple[Llama, Shape]:
    network = random_network(family, dtype=dtype, **WIDER)
    attach(network, LoraSpec(4, 8, dropout, targets, False), seed=0)
    network.recompute = recompute
    names: list[set[str]] = [set() for _ in network.model.layers]
    for name in adapted(network):
        parts = name.split(".")
        names[int(parts[2])].add(parts[-1])
    compiled = kernels() is not None and dtype in (torch.float32, torch.bfloat16)
    sets = tuple(frozenset(found) for found in names)
    width = dtype.itemsize
    return network.train(), Shape(network.arch, width, "none", sets, 4, dropout > 0, recompute, compiled)


def kept_by_autograd(network: Llama) -> tuple[int, PassCost]:
    """Bytes of the distinct storages that a forward pass leaves to the backward pass, weights apart."""
    generator = np.random.default_rng(0)
    rows = [
        (generator.integers(0, 256, size).astype(np.uint16), np.arange(size) >= size // 2) for size in LENGTHS
    ]
    (pack,) = make_packs(rows, sum(LENGTHS))
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # so that no address is used twice
        return tensor

    alive: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        pack_loss(network, pack)
    lengths = np.array(pack.lengths)
    return sum(found.values()), PassCost(
        float(lengths.sum()), float(len(pack.targets)), float(np.square(lengths).sum())
    )


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "targets", [("q_proj", "v_proj"), ("all-linear",), ("re:.*layers.1.*up_proj",)], ids=str
)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_saved_bytes_are_what_autograd_keeps(
    family: str, dtype: torch.dtype, targets: tuple[str, ...], dropout: float
) -> None:
    network, shape = network_and_shape(family, targets, dtype, dropout)
    kept, work = kept_by_autograd(network)
    assert saved_bytes(shape, work) == pytest.approx(kept, rel=0.04)


def test_recomputing_keeps_one_tensor_a_layer() -> None:
    whole, shape = network_and_shape("llama", ("all-linear",), torch.float32)
    kept_whole, _ = kept_by_autograd(whole)
    thrifty, thrifty_shape = network_and_shape("llama", ("all-linear",), torch.float32, recompute=True)
    kept, work = kept_by_autograd(thrifty)
    assert kept < kept_whole / 3
    assert saved_bytes(thrifty_shape, work) == pytest.approx(kept, rel=0.1)
    assert saved_bytes(thrifty_shape, work) < saved_bytes(shape, work) / 3
    assert working_bytes(thrifty_shape, work) > working_bytes(shape, work)


@pytest.mark.parametrize("family", ["llama", "llama-biases", "llama-tied"])
def test_counts_are_the_networks(family: str) -> None:
    network, shape = network_and_shape(family, ("q_proj", "down_proj"), torch.float32)
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in network.parameters()) - trainable
    assert num_trainable(shape) == trainable
    assert base_bytes(shape) == 4 * frozen
    assert base_bytes(replace(shape, quantize="int8")) < base_bytes(shape)


def test_flops_are_four_a_frozen_weight_and_token() -> None:
    """But for the vocabulary, attention, the adapter and the rows that the last layer leaves out."""
    network, shape = network_and_shape("llama", ("all-linear",), torch.float32)
    linears = sum(p.numel() for n, p in network.named_parameters() if "base.weight" in n)
    work = PassCost(1024, 1024, 0)
    head = 4 * 1024 * 64 * network.arch.vocab_size
    low_rank = 6 * 1024 * num_trainable(shape)
    expected = 4 * 1024 * linears + head + low_rank
    first = (
        2 * 1024 * 64 * (64 + 2 * 32)
    )  # before the first linears nothing is trained: no gradient goes there
    assert training_flops(shape, work) == pytest.approx(expected - first, rel=1e-9)
    assert training_flops(replace(shape, recompute=True), work) > 1.2 * training_flops(shape, work)
    assert training_flops(shape, PassCost(1024, 10, 0)) < training_flops(shape, work)
    assert 0.4 < forward_flops(shape, work) / training_flops(shape, work) < 0.6


def test_costs_are_linear_in_a_pass() -> None:
    _, shape = network_and_shape("llama", ("all-linear",), torch.float32)
    one, other = PassCost(100, 40, 3000), PassCost(30, 30, 900)
    both = PassCost(130, 70, 3900)
    for cost in (saved_bytes, training_flops, forward_flops):
        what: Any = cost
        assert what(shape, one) + what(shape, other) == pytest.approx(what(shape, both))
