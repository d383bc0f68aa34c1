"""Adapters: where they attach, what they are at the start, and what an impossible request is told."""

from __future__ import annotations

import math

import pytest
import torch
from tests.tiny_models import random_network

from lorafit.errors import ConfigError
from lorafit.model.attention import PackedDocuments
from lorafit.model.linear import Linear
from lorafit.model.lora import LoraLinear, LoraSpec, adapted, attach, disable_adapter, match_targets

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def spec(*targets: str, rslora: bool = False, dropout: float = 0.0) -> LoraSpec:
    return LoraSpec(4, 6.0, dropout, targets, rslora)


def test_targets_by_name_full_name_and_pattern() -> None:
    network = random_network()
    assert match_targets(network, ("q_proj",)) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    assert match_targets(network, ("layers.1.mlp.up_proj",)) == ["model.layers.1.mlp.up_proj"]
    names = match_targets(network, (r"re:.*layers\.0\..*_proj",))
    assert len(names) == 7
    assert all(name.startswith("model.layers.0.") for name in names)


def test_all_linear_is_the_seven_of_every_layer_and_never_the_head() -> None:
    names = match_targets(random_network(), ("all-linear",))
    assert len(names) == 14
    assert {name.rpartition(".")[2] for name in names} == set(ALL)


def test_every_target_that_matches_nothing_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        match_targets(random_network(), ("q_prj", "lm_head", "re:(", "v_proj"))
    messages = [problem.message for problem in caught.value.problems]
    assert len(messages) == 3
    assert "`q_prj` matches no linear" in messages[0]
    assert "`lm_head` is not adapted" in messages[1]
    assert "not a regular expression" in messages[2]
    assert "q_proj" in caught.value.problems[0].hint


def test_resolved_targets_are_short_only_where_every_layer_is_adapted() -> None:
    assert attach(random_network(), spec("q_proj", "v_proj"), 0).targets == ("q_proj", "v_proj")
    partial = attach(random_network(), spec("layers.0.self_attn.q_proj", "v_proj"), 0)
    assert partial.targets == ("model.layers.0.self_attn.q_proj", "v_proj")


def test_a_fresh_adapter_changes_nothing_and_only_it_is_trainable() -> None:
    network = random_network()
    ids = torch.arange(20)
    before = network.logits(network.hidden(ids, PackedDocuments([20])))
    attach(network, spec("all-linear"), seed=3)
    after = network.logits(network.hidden(ids, PackedDocuments([20])))
    assert torch.equal(before, after)
    trainable = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 28
    assert all(".lora_" in name for name in trainable)


def test_masters_are_float32_on_a_16_bit_base() -> None:
    network = random_network(dtype=torch.bfloat16)
    attach(network, spec("all-linear"), seed=0)
    assert {m.lora_A.dtype for m in adapted(network).values()} == {torch.float32}
    out = network.hidden(torch.arange(5), PackedDocuments([5]))
    assert out.dtype == torch.bfloat16


def test_disabled_is_the_base_to_the_bit() -> None:
    network = random_network()
    ids = torch.arange(20)
    base = network.hidden(ids, PackedDocuments([20]))
    attach(network, spec("all-linear"), seed=3)
    with torch.no_grad():
        for module in adapted(network).values():
            module.lora_B.normal_()
    assert not torch.equal(base, network.hidden(ids, PackedDocuments([20])))
    with disable_adapter(network, when=False):
        assert not torch.equal(base, network.hidden(ids, PackedDocuments([20])))
    with disable_adapter(network):
        assert torch.equal(base, network.hidden(ids, PackedDocuments([20])))
    assert not torch.equal(base, network.hidden(ids, PackedDocuments([20])))


def test_scale_is_alpha_over_rank_and_over_its_root() -> None:
    assert spec("q_proj").scale == 1.5
    assert spec("q_proj", rslora=True).scale == 6 / math.sqrt(4)


def test_dropout_acts_in_training_only_and_on_the_adapter_only() -> None:
    linear = Linear(64, 8, bias=False)
    torch.nn.init.normal_(linear.weight)
    module = LoraLinear(linear, spec("x", dropout=0.5), torch.Generator().manual_seed(0), like=linear.weight)
    x = torch.randn(5, 64)
    with torch.no_grad():
        assert torch.equal(module.train()(x), linear(x))  # B is zero: the base path has no dropout
        module.lora_B.normal_()
        assert not torch.equal(module.train()(x), module(x))
        assert torch.equal(module.eval()(x), module(x))


def test_one_seed_one_adapter() -> None:
    first, second, third = random_network(), random_network(), random_network()
    attach(first, spec("all-linear"), seed=1)
    attach(second, spec("all-linear"), seed=1)
    attach(third, spec("all-linear"), seed=2)
    a, b, c = (next(iter(adapted(n).values())).lora_A for n in (first, second, third))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
