"""A new quantisation is one class in QUANTIZERS: a toy one loads, is planned and is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar, get_args

import pytest
import torch
from tests.tiny_models import random_network, write_model
from torch import Tensor

from lorafit.config.schema import ModelSection
from lorafit.distributed.env import ProcessEnv
from lorafit.distributed.ranks import check_strategy
from lorafit.errors import ConfigError
from lorafit.model.architecture import read_architecture
from lorafit.model.attention import PackedDocuments
from lorafit.model.linear import LowRank, matmul
from lorafit.model.quant import QUANTIZERS, Quantize, QuantizedLinear, check_quantize
from lorafit.model.weights import load_network
from lorafit.plan.cost_model import Shape, base_bytes

CPU = torch.device("cpu")


class HalfLinear(QuantizedLinear):
    """Weights in float16."""

    bytes_per_weight: ClassVar = 2.0

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.register_buffer("weight", weight.half())

    @classmethod
    def check(cls, device: torch.device) -> None:
        if device.type != "cpu":
            raise ConfigError("half is for the CPU")

    def product(self, x: Tensor, addend: Tensor | None = None, low: LowRank | None = None) -> Tensor:
        out = matmul(x, self.dequantize().to(x.dtype), addend, low)
        return out if self.bias is None else out.add_(self.bias)

    def input_gradient(
        self, grad_output: Tensor, accumulate_into: Tensor | None = None, low: LowRank | None = None
    ) -> Tensor:
        weight = self.dequantize().to(grad_output.dtype)
        return matmul(grad_output, weight, accumulate_into, low, transposed=True, in_place=True)

    def dequantize(self) -> Tensor:
        weight: Tensor = self.weight  # type: ignore[assignment]
        return weight.float()


def test_the_config_has_the_names_of_the_quantizers() -> None:
    assert set(get_args(Quantize)) == {"none", *QUANTIZERS}
    assert ModelSection.model_fields["quantize"].annotation == Quantize


def test_a_toy_quantizer_loads_computes_and_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(QUANTIZERS, "half", HalfLinear)
    half: Quantize = "half"  # type: ignore[assignment]
    folder = write_model(tmp_path / "model", "llama-biases")
    arch = read_architecture(folder)
    network = load_network(folder, arch, torch.float32, CPU, quantize=half)
    kinds = {type(module) for name, module in network.named_modules() if name.endswith("_proj")}
    assert kinds == {HalfLinear}

    def logits(other: torch.nn.Module) -> Tensor:
        with torch.inference_mode():
            return network.logits(other.hidden(torch.arange(20), PackedDocuments([20])))  # type: ignore[operator]

    torch.testing.assert_close(logits(network), logits(random_network("llama-biases")), rtol=1e-2, atol=1e-2)

    shape = Shape(arch, 4, "none", (frozenset(),) * 2, 4, False, False, "kernel")
    assert base_bytes(shape) - base_bytes(replace(shape, quantize=half)) == 2 * arch.num_linear_weights
    check_quantize(half, CPU, torch.float32)
    with pytest.raises(ConfigError, match="half is for the CPU"):
        check_quantize(half, torch.device("cuda"), torch.float32)
    with pytest.raises(ConfigError, match="half cannot be combined with float64"):
        check_quantize(half, CPU, torch.float64)
    with pytest.raises(ConfigError, match="a base in half cannot be sharded"):
        check_strategy("fsdp", half, ProcessEnv())
