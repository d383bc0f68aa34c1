"""What mixes tokens ends where a document ends: not a bit of it depends on neighbours. A new mixer is one record."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny_models import random_network
from torch import Tensor, nn

from lorafit.model import mixer_shapes, mixers, native
from lorafit.model.architecture import Architecture
from lorafit.model.attention import PackedDocuments
from lorafit.model.convolution import convolution
from lorafit.model.definitions import wide
from lorafit.model.delta_rule import by_package, delta_rule, installed_rule
from lorafit.model.lora import LoraSpec, adapter_parameters, attach
from lorafit.model.lora_linear import Identity, project
from lorafit.model.mixer_shapes import DeltaHeads, MixerShape
from lorafit.model.mixers import add_linears, linears_of

CHANNELS = 7
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=5)
TYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mixed(lengths: Sequence[int], x: Tensor, weight: Tensor, slopes: Tensor) -> list[Tensor]:
    """(outputs, input gradients) of a pass of documents."""
    x = x.detach().requires_grad_()
    out = PackedDocuments(lengths).convolve(0, x, weight)
    out.backward(slopes)
    assert x.grad is not None
    return [out.detach(), x.grad]


@given(LENGTHS, st.integers(2, 5), TYPES, st.booleans(), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_a_convolved_document_has_the_bits_that_it_has_alone(
    lengths: list[int], width: int, dtype: torch.dtype, compiled: bool, random: Any
) -> None:
    total = sum(lengths)
    x, slopes = (numbers(seed, total, CHANNELS, dtype=dtype) for seed in (0, 1))
    weight = numbers(2, CHANNELS, 1, width, dtype=dtype)
    order = list(range(len(lengths)))
    random.shuffle(order)
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(native, "_build", lambda: (None, "off"))
        parts = list(zip(x.split(lengths), slopes.split(lengths), strict=True))
        alone = [mixed([len(one)], one, weight, slope) for one, slope in parts]
        x, slopes = (torch.cat([parts[at][side] for at in order]) for side in (0, 1))
        packed = mixed([lengths[at] for at in order], x, weight, slopes)
    for side in (0, 1):
        assert torch.equal(packed[side], torch.cat([alone[at][side] for at in order]))


@pytest.mark.parametrize("compiled", [True, False])
def test_the_convolution_is_that_of_torch(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(native, "_build", lambda: (None, "off"))
    x, slopes, weight = numbers(0, 300, 300), numbers(1, 300, 300), numbers(2, 300, 1, 4)
    own, theirs = (x.clone().requires_grad_() for _ in range(2))
    out = convolution(own, weight, torch.arange(300))
    peer = torch.nn.functional.conv1d(theirs.t()[None], weight, padding=3, groups=300)[0, :, :300].t()
    torch.testing.assert_close(out, peer, rtol=1e-5, atol=1e-5)
    for result in (out, peer):
        result.backward(slopes)
    torch.testing.assert_close(own.grad, theirs.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiled", [True, False])
def test_no_number_of_a_neighbour_is_read(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero times NaN is NaN: a neighbour that is multiplied by zero would show."""
    if not compiled:
        monkeypatch.setattr(native, "_build", lambda: (None, "off"))
    x, weight = numbers(0, 30, CHANNELS), numbers(1, CHANNELS, 1, 3)
    x[:10] = x[20:] = torch.nan
    slopes = x.clone()
    for result in mixed([10, 10, 10], x, weight, slopes):
        assert result[10:20].isfinite().all()
        assert not result[:10].isfinite().any()


HEADS = DeltaHeads(keys=2, values=4, key_dim=6, value_dim=10)


def ruled(lengths: Sequence[int], inputs: Sequence[Tensor], slopes: Tensor) -> list[Tensor]:
    """(outputs, gradients of the inputs) of the delta rule in a pass of documents."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = PackedDocuments(lengths).delta(0, *inputs, HEADS)
    return [out.detach(), *torch.autograd.grad(out, inputs, slopes)]


def of_rule(total: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values, decays and steps, and slopes of the outputs."""
    decay = -numbers(1, total, HEADS.values).square().to(wide(dtype))
    inputs = [numbers(0, total, HEADS.channels), decay, numbers(2, total, HEADS.values).sigmoid()]
    slopes = numbers(3, total, HEADS.values * HEADS.value_dim, dtype=dtype)
    return [inputs[0].to(dtype), inputs[1], inputs[2].to(dtype)], slopes


@given(
    st.lists(st.integers(1, 150), min_size=1, max_size=4),
    TYPES,
    st.booleans(),
    st.randoms(use_true_random=False),
)
@settings(max_examples=20, deadline=None)
def test_a_document_of_the_delta_rule_has_the_bits_that_it_has_alone(
    lengths: list[int], dtype: torch.dtype, compiled: bool, random: Any
) -> None:
    inputs, slopes = of_rule(sum(lengths), dtype)
    order = list(range(len(lengths)))
    random.shuffle(order)
    parts = list(zip(*(x.split(lengths) for x in (*inputs, slopes)), strict=True))
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(native, "_build", lambda: (None, "off"))
        alone = [ruled([len(slope)], own, slope) for *own, slope in parts]
        *joined, slopes = (torch.cat([parts[at][side] for at in order]) for side in range(4))
        packed = ruled([lengths[at] for at in order], joined, slopes)
    for side, result in enumerate(packed):
        assert torch.equal(result, torch.cat([alone[at][side] for at in order]))


def stand_in(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, cu_seqlens: Tensor, **options: bool
) -> tuple[Tensor, Tensor]:
    """flash-linear-attention's function, token by token: outputs (1, tokens, heads, value_dim), and states."""
    assert options == {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q[0], k[0]))
    outs, states = [], []
    for start, end in pairwise(cu_seqlens.tolist()):
        state = q.new_zeros(v.shape[2], q.shape[-1], v.shape[-1])
        for at in range(start, end):
            state = state * g[0, at].exp()[:, None, None]
            wrong = v[0, at] - torch.einsum("hkv,hk->hv", state, k[at])
            state = state + torch.einsum("hk,hv->hkv", k[at], beta[0, at, :, None] * wrong)
            outs.append(torch.einsum("hkv,hk->hv", state, q[at]) * q.shape[-1] ** -0.5)
        states.append(state)
    return torch.stack(outs)[None], torch.stack(states)


def test_the_package_gets_what_the_rule_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the package's signature gives the outputs, states and gradients of our own rule."""
    lengths = [3, 70, 1]
    inputs, slopes = of_rule(sum(lengths), torch.float64)
    results = []
    for rule in (delta_rule, partial(by_package, stand_in)):
        own = [x.detach().requires_grad_() for x in inputs]
        out, states = rule(*own, HEADS, lengths)
        results.append([out.detach(), states, *torch.autograd.grad(out, own, slopes)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=1e-9)
    assert installed_rule.__wrapped__() is None
    monkeypatch.setitem(sys.modules, "fla", ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.ops", ModuleType("fla.ops"))
    module = SimpleNamespace(chunk_gated_delta_rule=stand_in)
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", module)
    assert installed_rule.__wrapped__() is stand_in


@pytest.mark.skipif(native.kernels() is None, reason="no compiled kernels")
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 0.01)], ids=str)
def test_the_compiled_rule_is_that_of_torch(dtype: torch.dtype, close: float) -> None:
    lengths = [3, 64, 201]
    inputs, slopes = of_rule(sum(lengths), dtype)
    compiled = ruled(lengths, inputs, slopes)
    exact = ruled(lengths, [x.double() for x in inputs], slopes.double())
    for one, other in zip(compiled, exact, strict=True):
        assert float((one - other).norm()) <= close * float(other.norm())


class Average(nn.Module):
    """A toy mixer: each token's channels and those of the one before it."""

    def __init__(self, arch: Architecture, layer: int) -> None:
        super().__init__()
        self.layer, self.inputs = layer, ["toy_in"]
        add_linears(self, arch.mixer_linears(layer).items(), bias=False)
        self.result = Identity()

    def forward(self, x: Tensor, before: Any, rotary: Any, attend: Any, keys: Tensor | None = None) -> Any:
        (channels,) = project(linears_of(self, self.inputs), before, x, keys=keys)
        return (attend.convolve(self.layer, channels, torch.full((8, 1, 2), 0.5)),)


def test_a_toy_mixer_is_built_and_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = MixerShape("toy", {"toy_in": 8}, "toy_out", 8, states=((1, 8),))
    monkeypatch.setitem(mixer_shapes.SHAPES, "toy", lambda arch: shape)
    monkeypatch.setitem(mixers.MIXERS, "toy", Average)
    monkeypatch.setattr(Architecture, "mixer_kind", lambda arch, layer: ("toy", "attention")[layer])
    network = random_network("llama")
    assert network.arch.num_parameters == sum(parameter.numel() for parameter in network.parameters())
    attach(network, LoraSpec(4, 8.0, 0.0, ("all-linear",), False), seed=0)
    network.hidden(torch.arange(20), PackedDocuments([12, 8])).square().sum().backward()
    assert [name for name in adapter_parameters(network) if ".toy." in name] == [
        f"model.layers.0.toy.toy_{end}.lora_{part}" for end in ("in", "out") for part in "AB"
    ]
