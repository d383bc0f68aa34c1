"""The trial step on a real network: nothing of it is left behind, and what cannot learn is named."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny_models import FAMILIES, random_network

from lorafit.check import probe as probing
from lorafit.check.probe import Measured, probe, probe_verdicts
from lorafit.data.packing import Pack, Packer
from lorafit.model.llama import Llama
from lorafit.model.lora import LoraSpec, adapted, attach

SPEC = LoraSpec(4, 8, 0.1, ("all-linear",), False)


def network_of(family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Llama:
    network = random_network(family, dtype=dtype, **changes)
    attach(network, SPEC, seed=1)
    return network


def packs_of(lengths: tuple[int, ...] = (9, 14)) -> list[Pack]:
    generator = np.random.default_rng(0)
    rows = [
        (generator.integers(3, 250, length).astype(np.uint16), np.arange(length) >= length // 2)
        for length in lengths
    ]
    return Packer(64).packs(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_gets_a_gradient_in_every_family(family: str) -> None:
    seen = probe(network_of(family), packs_of(), 1e-3)
    assert seen.num_tensors == 28
    assert (seen.zero, seen.non_finite) == ((), ())
    assert seen.base == seen.before
    assert seen.after < seen.before
    assert seen.uniform == math.log(260)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_is_left_behind(dtype: torch.dtype) -> None:
    network = network_of(dtype=dtype).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.manual_seed(5)
    random = torch.get_rng_state()
    seen = probe(network, packs_of(), 1e-3)
    assert (seen.zero, seen.non_finite) == ((), ())
    assert network.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(layer.enabled for layer in adapted(network).values())


def test_an_adapter_to_continue_is_looked_at_from_the_first_step() -> None:
    network = network_of()
    with torch.no_grad():
        for layer in adapted(network).values():
            layer.lora_B.normal_(0, 0.05)
    seen = probe(network, packs_of(), 1e-3)
    assert seen.before != seen.base
    assert seen.zero == ()
    assert "with the adapter" in probe_verdicts(seen, 1e-3)[1].message


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_a_tensor_without_gradient_is_named(part: str) -> None:
    """Where B gets none, A never will: it stays behind a B of zeros."""
    network = network_of()
    name = "model.layers.1.self_attn.v_proj"
    getattr(network.get_submodule(name), part).register_hook(torch.zeros_like)
    seen = probe(network, packs_of(), 1e-3)
    assert set(seen.zero) == {f"{name}.{part}", f"{name}.lora_A"}
    verdict = probe_verdicts(seen, 1e-3)[0]
    assert (verdict.verdict, verdict.place) == ("fail", "lora.targets")
    assert f"{len(seen.zero)} of 28 adapter tensors get no gradient: {seen.zero[0]}" in verdict.message


def test_a_gradient_that_is_not_finite_is_named() -> None:
    network = network_of()
    layer = network.get_submodule("model.layers.0.mlp.up_proj")
    layer.lora_B.register_hook(lambda gradient: gradient * math.inf)
    seen = probe(network, packs_of(), 1e-3)
    assert "model.layers.0.mlp.up_proj.lora_B" in seen.non_finite
    assert probe_verdicts(seen, 1e-3)[0].verdict == "fail"
    assert all(bool(torch.isfinite(layer.lora_B).all()) for layer in adapted(network).values())


def test_an_error_on_the_way_leaves_nothing_behind_either(monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    real, calls = probing.pack_loss, []

    def fails_late(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("out")
        return real(*arguments)

    monkeypatch.setattr(probing, "pack_loss", fails_late)
    with pytest.raises(RuntimeError, match="out"):
        probe(network, packs_of(), 1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def measured(**changes: Any) -> Measured:
    usual: dict[str, Any] = {
        "targets": 90, "uniform": 10.4, "base": 1.5, "before": 1.5, "after": 1.4, "num_tensors": 28,
        "zero": (), "non_finite": (),
    }  # fmt: skip
    return Measured(**{**usual, **changes})


@pytest.mark.parametrize(
    ("changes", "verdicts", "key"),
    [
        ({}, ["pass", "pass", "pass"], ""),
        ({"base": 11.0, "before": 11.0, "after": 10.0}, ["pass", "warn", "pass"], "model.name"),
        ({"base": 0.001, "before": 0.001, "after": 0.001}, ["pass", "warn", "pass"], "data.path"),
        ({"before": math.nan}, ["pass", "fail", "warn"], "model.name"),
        ({"after": 1.7}, ["pass", "pass", "warn"], "train.learning_rate"),
        ({"after": math.nan}, ["pass", "pass", "warn"], "train.learning_rate"),
        ({"after": 1.5}, ["pass", "pass", "pass"], ""),
    ],
)
def test_what_a_probe_says(changes: dict[str, Any], verdicts: list[str], key: str) -> None:
    found = probe_verdicts(measured(**changes), 2e-4)
    assert [verdict.verdict for verdict in found] == verdicts
    assert key in {"", *(verdict.place for verdict in found if verdict.verdict != "pass")}
