"""A new LoRA variant is one class in VARIANTS: a toy one trains, is saved, loaded and merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from tests.tiny_models import random_network
from torch import Tensor, nn

from lorafit.errors import ModelError
from lorafit.model.adapter_file import adapter_files, adapter_tensors, load_adapter
from lorafit.model.attention import PackedDocuments
from lorafit.model.linear import Frozen
from lorafit.model.llama import Llama
from lorafit.model.lora import VARIANTS, LoraLinear, LoraSpec, adapted, adapter_parameters, attach
from lorafit.model.loss import loss_sum
from lorafit.model.multi_lora import Adapters
from lorafit.model.saved_adapter import read_adapter, read_spec

IDS = torch.arange(40) * 7 % 256
SPEC = LoraSpec(4, 8.0, 0.0, ("all-linear",), rslora=True, variant="magnitude")


class MagnitudeLora(LoraLinear):
    """LoRA on a base whose outputs have a learned scale each, as in DoRA but without its norm."""

    is_plain: ClassVar = False
    parts: ClassVar = (*LoraLinear.parts, "lora_magnitude")
    peft_keys: ClassVar = {"use_magnitude": True}

    def __init__(self, base: Frozen, spec: LoraSpec, generator: torch.Generator, like: Tensor) -> None:
        super().__init__(base, spec, generator, like)
        self.lora_magnitude = nn.Parameter(torch.ones_like(self.lora_B[:, 0]))

    def added(self, x: Tensor, out: Tensor) -> Tensor:
        low = self.scale * F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        magnitude = self.lora_magnitude.to(x.dtype)
        return (magnitude - 1) * out + magnitude * low

    def delta(self) -> Tensor:
        magnitude = self.lora_magnitude.float()[:, None]
        return (magnitude - 1) * self.base.dequantize().float() + magnitude * super().delta()

    @staticmethod
    def merge(weight: Tensor, tensors: Mapping[str, Tensor], scale: float) -> Tensor:
        return tensors["lora_magnitude"][:, None] * LoraLinear.merge(weight, tensors, scale)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "magnitude", MagnitudeLora)


def logits(network: Llama) -> Tensor:
    with torch.inference_mode():
        return network.eval().logits(network.hidden(IDS, PackedDocuments([len(IDS)])))


def loss(network: Llama) -> Tensor:
    hidden = network.hidden(IDS, PackedDocuments([len(IDS)]))
    return loss_sum(network.model.norm(hidden), network.lm_head.weight, IDS.roll(-1)) / len(IDS)


def train(network: Llama, steps: int = 5) -> list[float]:
    parameters = adapter_parameters(network).values()
    optimizer = torch.optim.SGD(parameters, lr=0.3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(network)
        value.backward()
        assert all(parameter.grad is not None for parameter in parameters)
        optimizer.step()
        losses.append(float(value.detach()))
    return losses


def saved(folder: Path, network: Llama, spec: LoraSpec) -> Path:
    folder.mkdir()
    for name, content in adapter_files(adapter_tensors(network), spec, "some/base", None).items():
        (folder / name).write_bytes(content)
    return folder


def test_it_trains_and_is_the_same_when_saved_loaded_and_merged(tmp_path: Path) -> None:
    network = random_network(head_dim=16)
    base = logits(network)
    spec = attach(network, SPEC, seed=0)
    torch.testing.assert_close(logits(network), base, rtol=1e-6, atol=1e-6)  # it starts at the base
    losses = train(network.train())
    assert losses[-1] < 0.9 * losses[0]
    trained = logits(network)

    folder = saved(tmp_path / "adapter", network, spec)
    assert read_spec(folder) == spec
    again = random_network(head_dim=16)
    attach(again, read_spec(folder), seed=3)
    load_adapter(again, folder)
    assert torch.equal(logits(again), trained)

    for from_file in (False, True):
        merged = random_network(head_dim=16)
        for name, module in adapted(network).items():
            weight = merged.get_submodule(name).weight.detach()
            parts = read_adapter(folder).tensors(name)
            whole = MagnitudeLora.merge(weight, parts, spec.scale) if from_file else weight + module.delta()
            merged.get_submodule(name).weight.data = whole
        torch.testing.assert_close(logits(merged), trained, rtol=1e-5, atol=1e-5)


class PlainByAutograd(LoraLinear):
    """LoRA itself on the path of variants."""

    is_plain: ClassVar = False


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_path_of_variants_computes_what_the_hand_written_one_does(
    dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(VARIANTS, "by-autograd", PlainByAutograd)
    results = []
    for variant in ("lora", "by-autograd"):
        network = random_network("llama-biases", dtype=torch.float64)
        attach(network, replace(SPEC, dropout=dropout, variant=variant), seed=0)
        generator = torch.Generator().manual_seed(0)
        for parameter in adapter_parameters(network).values():
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        torch.manual_seed(1)
        value = loss(network.train())
        value.backward()
        gradients = {name: parameter.grad for name, parameter in adapter_parameters(network).items()}
        results.append((value, gradients))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_rows_of_one_pass_can_have_it_beside_plain_adapters(tmp_path: Path) -> None:
    folders, alone = {}, {}
    for number, spec in enumerate((SPEC, replace(SPEC, variant="lora", rank=3))):
        network = random_network(head_dim=16, dtype=torch.float64)
        resolved = attach(network, spec, seed=number)
        train(network)
        folders[spec.variant] = saved(tmp_path / spec.variant, network, resolved)
        alone[spec.variant] = one_token_each(network)
    network = random_network(head_dim=16, dtype=torch.float64)
    alone[None] = one_token_each(network)
    adapters = Adapters(network, folders)
    names = ["magnitude", None, "lora", "magnitude", "lora"]
    for taken in (names, ["magnitude"], ["lora"], [None], names[::-1]):
        adapters.take(taken)
        made = one_token_each(network)
        for row, name in enumerate(taken * (5 // len(taken))):
            torch.testing.assert_close(made[row], alone[name][row], rtol=1e-9, atol=1e-9)


def one_token_each(network: Llama) -> Tensor:
    with torch.inference_mode():
        return network.eval().logits(network.hidden(IDS[:5], PackedDocuments([1] * 5)))


def test_llama_cpp_has_no_adapter_of_it(tmp_path: Path) -> None:
    from lorafit.export.gguf_model import write_lora

    source: Any = SimpleNamespace(saved=SimpleNamespace(spec=SPEC))
    with pytest.raises(ModelError, match="no adapters of the variant `magnitude`"):
        write_lora(source, tmp_path / "lora.gguf")
