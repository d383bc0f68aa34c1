"""Recorded kernel calls: the same bits as called one by one, on any number of threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lorafit.model.decode_linear import decode_linear
from lorafit.model.linear import Frozen, Linear
from lorafit.model.lora import LoraLinear, LoraSpec
from lorafit.model.native import Kernels, kernels, missing
from lorafit.model.native.recording import Recording
from lorafit.model.ops import add_scaled, rms_norm, swiglu
from lorafit.model.quant import Int8Linear

pytestmark = pytest.mark.skipif(kernels() is None, reason=missing() or "there are kernels")
WIDTH = 112  # two blocks of columns and a part of one
WEIGHT = torch.linspace(-1, 1, WIDTH)
MOST_ROWS = 16
SUMS = torch.arange(MOST_ROWS * WIDTH, dtype=torch.int32)


def compiled() -> Kernels:
    found = kernels()
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def linear(number: int) -> Frozen | LoraLinear:
    """A linear with or without an adapter, in 32 or 8 bits."""
    random = torch.Generator().manual_seed(number)
    plain = Linear(WIDTH, WIDTH, bias=False)
    plain.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=random) / 7, requires_grad=False)
    base = Int8Linear(plain.weight) if number % 2 else plain
    if number % 3 == 0:
        return base
    spec = LoraSpec(rank=number % 5 + 1, alpha=4, dropout=0.0, targets=(), rslora=False)
    adapted = LoraLinear(base, spec, random, like=torch.zeros(1)).requires_grad_(False).eval()
    adapted.lora_B.copy_(torch.randn(adapted.lora_B.shape, generator=random))
    return adapted


def in_place(x: Tensor) -> Tensor:
    """A kernel that begins a parallel region of its own: in a recorded pass only the first thread may run it."""
    y = add_scaled(x, x, 0.5)
    compiled().call("dequantize", x.dtype, *x.shape, SUMS, WEIGHT, WEIGHT, y, y)
    return y


def gated(x: Tensor) -> Tensor:
    """Of a normed row: squares of squares would not stay finite."""
    y = rms_norm(x, WEIGHT, 1e-5)[0]
    return swiglu(y, y)


LINEARS = [linear(number) for number in range(12)]
KERNELS: list[Callable[[Tensor], Tensor]] = [
    lambda x: rms_norm(x, WEIGHT, 1e-5)[0],
    in_place,
    gated,
    lambda x: add_scaled(x, x, 0.25),
    *(lambda x, linear=linear: decode_linear(linear, x) for linear in LINEARS),  # type: ignore[misc]
]


def through(x: Tensor, numbers: Sequence[int]) -> Tensor:
    for number in numbers:
        x = KERNELS[number](x)
    return x


def recorded(x: Tensor, numbers: Sequence[int]) -> tuple[Recording, Tensor]:
    with compiled().recording() as record:
        out = through(x, numbers)
    assert not record.other
    return record, out


@given(
    st.lists(st.integers(0, len(KERNELS) - 1), min_size=1, max_size=12),
    st.integers(1, MOST_ROWS),
    st.integers(1, 5),
)
@torch.inference_mode()
def test_any_kernels_give_the_same_bits(numbers: list[int], rows: int, threads: int) -> None:
    x = torch.ones(rows, WIDTH)
    record, out = recorded(x, numbers)
    for seed in range(2):
        x.copy_(torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)))
        torch.set_num_threads(threads)
        record.run()
        torch.set_num_threads(1)
        assert torch.equal(out, through(x, numbers))


def test_a_pass_is_the_same_in_two_python_threads() -> None:
    """Their teams do not meet: each runs its own calls, also while the other runs."""
    numbers = list(range(len(KERNELS)))
    passes = 200
    wrong: list[int] = []

    @torch.inference_mode()
    def run(seed: int) -> None:
        torch.set_num_threads(2)
        x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(seed))
        record, out = recorded(x, numbers)
        expected = out.clone()
        for _ in range(passes):
            out.zero_()
            record.run()
            wrong.extend([] if torch.equal(out, expected) else [seed])

    both = [threading.Thread(target=run, args=(seed,)) for seed in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert not wrong
