"""Products of a few rows: the compiled ones are what the linears say, and are taken where they may be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lorafit.model import decode_linear as module
from lorafit.model import native
from lorafit.model.decode_linear import MOST_ROWS, are_few, decode_linear, head
from lorafit.model.linear import Frozen, Linear
from lorafit.model.lora import LoraLinear, LoraSpec
from lorafit.model.lora_linear import Identity, project
from lorafit.model.native import kernels, missing
from lorafit.model.quant import Int8Linear

needs_kernels = pytest.mark.skipif(kernels() is None, reason=missing() or "there are kernels")
SPEC = LoraSpec(rank=5, alpha=10, dropout=0.5, targets=(), rslora=False)
DTYPES = [torch.float32, torch.bfloat16]


def plain(width: int, columns: int, dtype: torch.dtype, bias: bool = True) -> Linear:
    linear = Linear(width, columns, bias=bias)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.normal_()
    return linear.to(dtype).requires_grad_(False)


def eight_bit(width: int, columns: int, dtype: torch.dtype) -> Int8Linear:
    weight = plain(width, columns, dtype).weight
    return Int8Linear(weight * torch.linspace(0.1, 3, width).to(dtype))  # columns of different size


def adapted(base: Frozen, dtype: torch.dtype) -> LoraLinear:
    linear = LoraLinear(base, SPEC, torch.Generator().manual_seed(0), like=torch.zeros(1, dtype=dtype))
    nn.init.normal_(linear.lora_B)
    return linear.requires_grad_(False).eval()


def exactly(linear: nn.Module, x: Tensor) -> Tensor:
    """What `linear` stands for, in float64."""
    base = getattr(linear, "base", linear)
    out = x.double() @ base.dequantize().double().t()
    if base.bias is not None:
        out += base.bias
    if isinstance(linear, LoraLinear) and linear.enabled:
        out += linear.scale * (x.double() @ linear.lora_A.double().t()) @ linear.lora_B.double().t()
    return out


@needs_kernels
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 13, 16])
@pytest.mark.parametrize(("width", "columns"), [(64, 30), (100, 37), (5, 9), (33, 20)])
@pytest.mark.parametrize("make", [plain, eight_bit], ids=["16 bit", "8 bit"])
@torch.inference_mode()
def test_it_is_the_product_that_the_linear_stands_for(
    make: Callable[[int, int, torch.dtype], Frozen], width: int, columns: int, rows: int
) -> None:
    torch.manual_seed(rows)
    for dtype in DTYPES:
        x, residual = torch.randn(rows, width).to(dtype), torch.randn(rows, columns).to(dtype)
        base = make(width, columns, dtype)
        for linear in (base, adapted(base, dtype)):
            exact = exactly(linear, x)
            for out, expected in (
                (decode_linear(linear, x), exact),
                (decode_linear(linear, x, residual), exact + residual),
            ):
                far = (out - expected).norm() / expected.norm()
                assert far < (1e-5 if dtype == torch.float32 else 6e-3)


@needs_kernels
@torch.inference_mode()
def test_a_row_has_the_same_bits_whatever_its_neighbours_and_the_threads() -> None:
    x, linear = torch.randn(16, 200).bfloat16(), adapted(eight_bit(200, 50, torch.bfloat16), torch.bfloat16)
    whole = decode_linear(linear, x)
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(decode_linear(linear, x), whole)
        for row in range(16):
            assert torch.equal(decode_linear(linear, x[row : row + 1]), whole[row : row + 1])
    torch.set_num_threads(before)


@needs_kernels
@torch.inference_mode()
def test_a_large_weight_has_the_same_bits_on_any_number_of_threads() -> None:
    """Its parts go to the thread that is free first; the last part is shorter."""
    linear, x = plain(1024, 2600, torch.float32), torch.randn(2, 1024)
    before, outs = torch.get_num_threads(), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        outs.append(decode_linear(linear, x))
    torch.set_num_threads(before)
    torch.testing.assert_close(outs[0].double(), exactly(linear, x), rtol=1e-4, atol=1e-3)
    assert all(torch.equal(out, outs[0]) for out in outs)


@needs_kernels
def test_only_a_few_rows_that_nothing_is_learned_from_go_this_way() -> None:
    linear, x = adapted(plain(8, 8, torch.float32), torch.float32), torch.randn(2, 8)
    assert not are_few([linear], x)
    with torch.no_grad():
        assert not are_few([linear], x)
    with torch.inference_mode():
        assert are_few([linear], x)
        assert not are_few([linear], torch.randn(MOST_ROWS + 1, 8))
        assert not are_few([linear], x.double())
        assert not are_few([linear, plain(8, 8, torch.bfloat16)], x)
        linear.train()
        assert not are_few([linear], x)  # dropout
        linear.enabled = False
        assert are_few([linear], x)


@pytest.mark.parametrize("path", ["compiled", "torch"])
@torch.inference_mode()
def test_project_says_the_same_on_both_ways(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "torch":
        monkeypatch.setattr(native, "_build", lambda: (None, "off"))
        monkeypatch.setattr(module, "_call", None)
    elif kernels() is None:
        pytest.skip(missing())
    torch.manual_seed(0)
    linears = [adapted(plain(24, 10, torch.float32), torch.float32), plain(24, 6, torch.float32)]
    x, residual = torch.randn(3, 24), torch.randn(3, 10)
    for linear, out in zip(linears, project(linears, Identity(), x), strict=True):
        torch.testing.assert_close(out.double(), exactly(linear, x), rtol=1e-5, atol=1e-4)
    (out,) = project(linears[:1], Identity(), x, residual=residual)
    torch.testing.assert_close(out.double(), exactly(linears[0], x) + residual, rtol=1e-5, atol=1e-4)
    linears[0].lora_B.mul_(2)  # a training step between two answers: nothing is kept of the masters
    torch.testing.assert_close(
        project(linears, Identity(), x)[0].double(), exactly(linears[0], x), rtol=1e-5, atol=1e-4
    )
    torch.testing.assert_close(head(x, linears[1].weight), x @ linears[1].weight.t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
@pytest.mark.parametrize("rows", [1, 16, 17, 40])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
@torch.inference_mode()
def test_logits_are_not_rounded_to_16_bits(
    dtype: torch.dtype, rows: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row has the same bits alone. Two logits that differ after the eighth bit stay apart."""
    if not compiled:
        monkeypatch.setattr(native, "_build", lambda: (None, "off"))
        monkeypatch.setattr(module, "COLUMNS_AT_ONCE", 16)
    elif kernels() is None:
        pytest.skip(missing())
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 64).to(dtype), torch.randn(37, 64).to(dtype)
    x[:, :2], weight[-2:], weight[-2:, :2] = 1.0, 0.0, torch.tensor([[128.0, 0.0], [128.0, 0.25]]).to(dtype)
    logits = head(x, weight)
    assert logits.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(logits.double(), x.double() @ weight.double().t(), rtol=1e-5, atol=1e-4)
    assert logits.argmax(-1).tolist() == [36] * rows
    if compiled and dtype in DTYPES:
        assert torch.equal(torch.cat([head(row, weight) for row in x.split(1)]), logits)
