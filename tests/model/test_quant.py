"""Quantised linears: how far their products and gradients are from the weight's own, also with outliers."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.tiny_models import random_network
from torch import Tensor

from lorafit.errors import ConfigError
from lorafit.model.attention import PackedDocuments
from lorafit.model.linear import Frozen, Linear
from lorafit.model.lora import LoraSpec, attach
from lorafit.model.loss import loss_sum
from lorafit.model.native import kernels
from lorafit.model.ops import outlier_columns
from lorafit.model.quant import (
    Fp8Linear,
    Int8Linear,
    Nf4Linear,
    _int8_product,
    _Quantized,
    check_quantize,
)

CPU = torch.device("cpu")
KINDS = pytest.mark.parametrize(
    ("kind", "bound"), [(Int8Linear, 0.015), (Fp8Linear, 0.06), (Nf4Linear, 0.13)], ids=["int8", "fp8", "nf4"]
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact.double()).norm() / exact.double().norm())


def linear_of(kind: type[Frozen], weight: Tensor) -> Frozen:
    if kind is Nf4Linear:
        pytest.importorskip("bitsandbytes", reason="nf4 needs the extra `nf4`")
    return kind(weight)  # type: ignore[call-arg, arg-type]


@KINDS
@DTYPES
def test_products_and_gradients_are_near_the_weight_s_own(
    kind: type[Frozen], bound: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 128).to(dtype) * 0.02
    x, grad_output = torch.randn(40, 128).to(dtype), torch.randn(40, 96).to(dtype)
    linear = linear_of(kind, weight)
    assert error(linear.dequantize(), weight) < bound
    assert error(linear(x), x.double() @ weight.double().t()) < bound
    assert error(linear.input_gradient(grad_output), grad_output.double() @ weight.double()) < bound
    bias = torch.randn(96).to(dtype)
    linear.bias = torch.nn.Parameter(bias, requires_grad=False)
    before = torch.randn(40, 96).to(dtype)
    exact = before.double() + x.double() @ weight.double().t() + bias.double()
    assert error(linear.product(x, before.clone()), exact) < bound
    into = torch.randn(40, 128).to(dtype)
    assert (
        error(
            linear.input_gradient(grad_output, into.clone()),
            into.double() + grad_output.double() @ weight.double(),
        )
        < bound
    )


def test_int8_gradient_is_that_of_the_quantised_weight() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64) * torch.logspace(-3, 0, 64)[:, None]  # channels of very different size
    linear = Int8Linear(weight)
    grad_output = torch.randn(50, 64)
    assert error(linear.input_gradient(grad_output), grad_output @ linear.dequantize()) < 0.012


@pytest.mark.parametrize("factor", [50.0, 500.0])
def test_int8_keeps_outlier_columns_out(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 256) * 0.02
    x, grad_output = torch.randn(300, 256), torch.randn(300, 96)
    x[:, [3, 77, 200]] *= factor
    grad_output[:, [5, 60]] *= factor
    linear = Int8Linear(weight)
    exact, exact_back = x.double() @ weight.double().t(), grad_output.double() @ weight.double()
    assert error(linear(x), exact) < 0.012
    assert error(linear.input_gradient(grad_output), exact_back) < 0.012
    # what the ordinary columns say must survive beside the outliers
    quiet = torch.ones(256).index_fill(0, torch.tensor([3, 77, 200]), 0)
    ordinary, loud = (x * quiet).double() @ weight.double().t(), (x * (1 - quiet)) @ linear.dequantize().t()
    assert error(linear(x) - loud, ordinary) < 0.02
    monkeypatch.setattr("lorafit.model.quant._OUTLIER", float("inf"))
    assert error(linear(x) - loud, ordinary) > 0.1


def test_a_network_in_int8_has_nearly_the_gradients_of_its_16_bit_self() -> None:
    network = random_network("llama-biases", hidden_size=128, intermediate_size=192, seed=3)
    spec = LoraSpec(4, 8.0, 0.0, ("all-linear",), False)
    small = copy.deepcopy(network)
    for parent in list(small.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear):
                few = Int8Linear(child.weight.data)
                few.bias = child.bias
                setattr(parent, name, few)
    ids = torch.randint(0, 256, (70,), generator=torch.Generator().manual_seed(0))
    gradients = []
    for each in (network, small):
        attach(each, spec, seed=0)
        torch.manual_seed(5)
        with torch.no_grad():
            for name, parameter in each.named_parameters():
                if name.endswith("lora_B"):
                    parameter.normal_(std=0.05)
        hidden = each.hidden(ids[:-1], PackedDocuments([30, 39]))
        loss_sum(each.model.norm(hidden), each.lm_head.weight, ids[1:]).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in each.parameters() if p.grad is not None]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.995


def test_what_cannot_be_done_is_said() -> None:
    with pytest.raises(ConfigError, match="8.9"):
        check_quantize("fp8", CPU, torch.bfloat16)
    with pytest.raises(ConfigError, match="no product on mps"):
        check_quantize("int8", torch.device("mps"), torch.float32)
    with pytest.raises(ConfigError, match="float64"):
        check_quantize("int8", CPU, torch.float64)
    check_quantize("int8", CPU, torch.bfloat16)
    check_quantize("none", CPU, torch.float64)


def test_nf4_without_bitsandbytes_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.functional", None)
    with pytest.raises(ConfigError, match="bitsandbytes") as caught:
        check_quantize("nf4", CPU, torch.bfloat16)
    assert "lorafit[nf4]" in str(caught.value.problems[0].hint)


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("rows", [1, 31, 64, 333])
@pytest.mark.parametrize(("depth", "columns"), [(64, 16), (192, 100), (640, 321)])
@pytest.mark.parametrize("num_outliers", [0, 1, 19])
@DTYPES
def test_int8_on_matrix_tiles_is_exact(
    rows: int, depth: int, columns: int, num_outliers: int, transposed: bool, dtype: torch.dtype
) -> None:
    compiled = kernels()
    if compiled is None or not compiled.has_products:
        pytest.skip("the processor has no dot products of short numbers")
    generator = torch.Generator().manual_seed(rows)
    outliers = torch.randperm(depth, generator=generator)[:num_outliers]
    x = _Quantized(
        torch.randint(-127, 128, (rows, depth), generator=generator, dtype=torch.int8),
        torch.rand(rows, generator=generator),
        (100 * torch.randn(rows, depth, generator=generator)).to(dtype),
        torch.rand(depth, generator=generator),
        outliers,
    )
    x.q[:, outliers] = 0
    shape = (depth, columns) if transposed else (columns, depth)
    weight = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    scale, addend = torch.rand(columns, generator=generator), torch.rand(rows, columns, generator=generator)
    sums = x.q.double() @ (weight if transposed else weight.t()).double()
    loud = (x.source.double() * x.factor.double())[:, outliers]
    sums = sums * x.scale.double()[:, None] + loud @ (weight if transposed else weight.t()).double()[outliers]
    exact = sums * scale.double()
    into = addend.to(dtype)
    for got, wanted in (
        (_int8_product(x, weight, scale, None, None, transposed=transposed), exact),
        (_int8_product(x, weight, scale, into, None, transposed=transposed), exact + into.double()),
    ):
        rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-22
        # a sum of outliers in float32 is as exact as its largest parts
        largest = rounding if not num_outliers else max(rounding, 2.0**-21 * float(wanted.abs().max()))
        torch.testing.assert_close(got.double(), wanted, rtol=rounding, atol=largest)


@pytest.mark.parametrize("width", [1, 64, 65])
def test_outlier_columns_are_the_same_without_kernels(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(width)
    x, factor = torch.randn(50, width, generator=generator), torch.rand(width, generator=generator)
    x[:, width // 2] *= 90
    found = outlier_columns(x, factor, 6.0, 3)
    monkeypatch.setattr("lorafit.model.ops.fits", lambda *tensors: False)
    plain = outlier_columns(x, factor, 6.0, 3)
    assert found[0].tolist() == plain[0].tolist()
    assert torch.equal(found[1], plain[1])
    assert width == 1 or width // 2 in found[0]


def test_nf4_leaves_the_device_whole() -> None:
    """The tensors of its state are no buffers; a proof frees the network's memory for the fresh process."""
    linear = linear_of(Nf4Linear, torch.randn(64, 64) * 0.02)
    linear.to("meta")
    assert linear._state is None
    assert all(buffer.is_meta for buffer in linear.buffers())
