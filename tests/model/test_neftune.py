"""The noise of NEFTune: sizes of transformers, a function of the step and the row alone, none outside of training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.tiny_models import random_network
from torch import Tensor

from lorafit.data.packing import Packer, TokenRow
from lorafit.forward import pack_loss, pack_predictions
from lorafit.model.llama import Llama
from lorafit.model.lora import LoraSpec, adapter_parameters, attach
from lorafit.model.ops import uniform

ALPHA = 5.0
_START = np.arange(9) + 40  # a prefix of all rows


def rows() -> list[TokenRow]:
    generator = np.random.default_rng(0)
    texts = [np.concatenate([_START, generator.integers(0, 256, size)]) for size in (3, 20, 8)]
    return [(text.astype(np.uint16), np.arange(len(text)) >= len(text) // 2) for text in texts]


def network_with_noise(alpha: float = ALPHA) -> Llama:
    network = random_network(dtype=torch.float64)
    attach(network, LoraSpec(4, 8.0, 0.2, ("all-linear",), False), seed=0)
    network.neftune = alpha
    with torch.no_grad():
        for parameter in adapter_parameters(network).values():
            parameter.add_(0.1)
    return network.train()


def step(network: Llama, packer: Packer, seed: int = 3) -> tuple[float, list[Tensor]]:
    """Loss and gradients of a step: each pass starts from the same random state, as in the loop."""
    total = 0.0
    for pack in packer.packs(rows()):
        torch.manual_seed(seed)
        loss = pack_loss(network, pack)
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    parameters = adapter_parameters(network).values()
    gradients = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    for parameter in parameters:
        parameter.grad = None
    return total, gradients


def test_noise_does_not_depend_on_packing_and_changes_with_the_step() -> None:
    network = network_with_noise()
    whole = step(network, Packer(1000, may_share=False))
    for packer in (Packer(1000, packing=False, may_share=False), Packer(40, may_share=False)):
        torch.testing.assert_close(step(network, packer), whole, rtol=1e-9, atol=1e-12)
    assert step(network, Packer(1000, may_share=False), seed=4)[0] != whole[0]
    network.neftune = 0.0
    without = step(network, Packer(1000, may_share=False))
    assert abs(without[0] - whole[0]) > 1e-3
    network.neftune = ALPHA
    with torch.no_grad():  # no noise outside of training: a shared prefix changes nothing
        (pack,) = Packer(1000).packs(rows())
        noisy = pack_predictions(network.eval(), pack)[0]
        network.neftune = 0.0
        assert np.array_equal(noisy, pack_predictions(network, pack)[0])


def test_noise_has_the_size_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    neftune = pytest.importorskip("transformers.integrations.neftune")
    network, seen = network_with_noise(), []
    real = network.hidden

    def hidden(*args: Tensor) -> Tensor:
        seen.append(args)
        return real(*args)

    monkeypatch.setattr(network, "hidden", hidden)
    (pack,) = Packer(1000, may_share=False).packs(rows())
    pack_loss(network, pack)
    noise = seen[0][4]
    end = 0
    for length in pack.lengths:
        own = noise[torch.from_numpy(pack.index[end : end + length])]
        end += length
        module = torch.nn.Embedding(4, network.arch.hidden_size).train()
        module.neftune_noise_alpha = torch.tensor(ALPHA)
        theirs = neftune.neftune_post_forward_hook(
            module, (), torch.zeros(1, length + 1, network.arch.hidden_size)
        )
        largest = ALPHA / ((length + 1) * network.arch.hidden_size) ** 0.5
        for made in (own, theirs):
            assert 0.97 * largest < made.abs().max() <= largest
            assert float(made.std()) == pytest.approx(largest / 3**0.5, rel=0.06)
            assert abs(float(made.mean())) < 0.1 * largest


def test_numbers_are_a_function_of_the_key_and_not_of_the_place() -> None:
    keys = torch.randint(-(2**62), 2**62, (700,), generator=torch.Generator().manual_seed(0))
    made = uniform(7, keys, 40)
    assert torch.equal(uniform(7, keys.flip(0), 40).flip(0), made)
    assert not torch.equal(uniform(8, keys, 40), made)
    assert made.abs().max() <= 1
    counts = torch.histc(made, 10, -1, 1)
    assert counts.min() > 0.95 * made.numel() / 10
