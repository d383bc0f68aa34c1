"""A frozen product is the exact one up to rounding, both ways, in place and new, with tiles and without."""

from __future__ import annotations

import pytest
import torch

from lorafit.model.linear import Linear, matmul
from lorafit.model.native import kernels


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("rows", [1, 31, 32, 70, 333])
@pytest.mark.parametrize(("depth", "columns"), [(32, 7), (96, 50), (100, 33), (640, 321), (5632, 64)])
def test_a_bfloat16_product_is_the_exact_one_rounded_once(
    rows: int, depth: int, columns: int, transposed: bool
) -> None:
    generator = torch.Generator().manual_seed(rows + depth)
    x = torch.randn(rows, depth, generator=generator).bfloat16()
    weight = torch.randn((depth, columns) if transposed else (columns, depth), generator=generator).bfloat16()
    addend = torch.randn(rows, columns, generator=generator).bfloat16()
    exact = x.double() @ (weight if transposed else weight.t()).double()
    rounding = 2.0**-8 * (1 + exact.abs()) + 1e-6 * depth
    assert bool(((matmul(x, weight, transposed=transposed).double() - exact).abs() <= rounding).all())
    into = addend.clone()
    got = matmul(x, weight, into, transposed=transposed, in_place=True)
    assert got.data_ptr() == into.data_ptr()
    rounding += 2.0**-8 * addend.double().abs()
    assert bool(((got.double() - exact - addend.double()).abs() <= rounding).all())
    for rank in (8, 33):
        p = torch.randn(rows, rank, generator=generator).bfloat16()
        q = torch.randn((rank, columns) if transposed else (columns, rank), generator=generator).bfloat16()
        more = addend.double() + p.double() @ (q if transposed else q.t()).double()
        got = matmul(x, weight, addend, (p, q), transposed=transposed)
        assert got.data_ptr() != addend.data_ptr()
        bound = rounding + 2.0**-7 * (more.abs() + exact.abs())
        assert bool(((got.double() - exact - more).abs() <= bound).all())


def test_a_row_has_the_same_bits_whatever_the_threads_and_the_rows_beside_it() -> None:
    compiled = kernels()
    if compiled is None or not compiled.has_products:
        pytest.skip("the processor has no dot products of short numbers")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 4160, generator=generator).bfloat16()
    weight = torch.randn(1000, 4160, generator=generator).bfloat16()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = matmul(x, weight)
        torch.set_num_threads(3)
        assert torch.equal(matmul(x, weight), alone)
        assert torch.equal(matmul(x[40:77].contiguous(), weight), alone[40:77])
    finally:
        torch.set_num_threads(threads)


def test_a_linear_with_a_bias_adds_it_once() -> None:
    linear = Linear(64, 96, bias=True).to(torch.bfloat16)
    assert linear.bias is not None
    with torch.no_grad():
        linear.weight.normal_()
        linear.bias.fill_(3.0)
    x, addend = torch.zeros(40, 64, dtype=torch.bfloat16), torch.ones(40, 96, dtype=torch.bfloat16)
    assert bool((linear.product(x) == 3).all())
    assert bool((linear.product(x, addend) == 4).all())
    assert bool((addend == 1).all())
