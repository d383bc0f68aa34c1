"""Low rank inside the frozen product: the merged matrix beside the linears and adapters that it stands for."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lorafit.model.linear import Linear
from lorafit.model.lora import LoraLinear, LoraSpec
from lorafit.model.merged import Merged, mergeable

ranks = st.none() | st.integers(1, 9)  # None is a linear without an adapter


def linear_of(ins: int, out: int, rank: int | None, bias: bool, scale: float) -> Any:
    base = Linear(ins, out, bias).double()
    for parameter in base.parameters():
        nn.init.normal_(parameter)
    base.requires_grad_(False)
    if rank is None:
        return base
    spec = LoraSpec(rank, scale * rank, 0.0, ("all-linear",), False)
    linear = LoraLinear(base, spec, torch.Generator().manual_seed(0), base.weight)
    nn.init.normal_(linear.lora_B)
    return linear


def exact(linear: Any, x: Tensor) -> Tensor:
    base = getattr(linear, "base", linear)
    out = nn.functional.linear(x, base.weight, base.bias)
    if base is linear:
        return out
    return out + linear.scale * (x @ linear.lora_A.t()) @ linear.lora_B.t()


@given(
    st.lists(st.tuples(st.integers(1, 12), ranks, st.booleans()), min_size=1, max_size=3),
    st.integers(1, 12),
    st.integers(1, 5),
    st.sampled_from([0.5, 2.0]),
)
def test_outputs_and_all_gradients_are_those_of_the_linears(
    shapes: list[tuple[int, int | None, bool]], ins: int, rows: int, scale: float
) -> None:
    torch.manual_seed(0)
    linears = [linear_of(ins, out, rank, bias, scale) for out, rank, bias in shapes]
    assert mergeable(linears)
    x = torch.randn(rows, ins, dtype=torch.float64).requires_grad_()
    wanted = torch.cat([exact(linear, x) for linear in linears], dim=1)
    slope, addend = torch.randn_like(wanted), torch.randn_like(wanted)
    wanted.backward(slope)
    parameters = [part for linear in linears if hasattr(linear, "lora_A") for part in linear.parameters()]

    merged = Merged(linears)
    for trained, place in merged.copies():
        place.copy_(trained.detach())
    room = merged.room(rows)
    room[:, :ins] = x.detach()
    out, low = merged.product(room, None)
    close(out, wanted)
    close(merged.product(room, None, addend)[0], wanted + addend)
    close(merged.product_apart(x.detach(), None, addend)[0], wanted + addend)
    room = merged.room_of_gradients(rows)
    room[:, : merged.out] = slope
    d_x, of_b = merged.gradients(room, low, None)
    close(d_x, x.grad)
    found = merged.parameter_gradients(room, x.detach(), of_b, None)
    trained = [part for part in parameters if part.requires_grad]
    assert len(found) == len(trained)
    for gradient, parameter in zip(found, trained, strict=True):
        close(gradient, parameter.grad)
    for linear in linears:  # the weights are parts of the matrix, and still theirs
        assert getattr(linear, "base", linear).weight.untyped_storage().data_ptr() == merged.upper.data_ptr()
        close(torch.cat([exact(each, x) for each in linears], dim=1), wanted)


def close(found: Tensor, wanted: Tensor | None) -> None:
    assert wanted is not None
    assert float((found - wanted).detach().norm()) <= 1e-12 * float(wanted.detach().norm().clamp(min=1.0))


def test_what_is_not_merged() -> None:
    one, other = linear_of(4, 4, 2, False, 1.0), linear_of(4, 4, 2, False, 2.0)
    assert not mergeable([one, other])  # one product has one scale
    other.scale = 1.0
    assert mergeable([one, other])
    other.dropout = 0.5
    assert not mergeable([one, other])  # and one input of A
    other.dropout, other.is_plain = 0.0, False
    assert not mergeable([one, other])
