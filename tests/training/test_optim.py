"""One AdamW step by the book, and the learning rate of every step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lorafit.config.schema import TrainSection
from lorafit.model.adamw import BETAS, EPS, AdamW
from lorafit.training.optim import learning_rate

Schedule = Literal["cosine", "linear", "constant"]
SCHEDULES = st.sampled_from(["cosine", "linear", "constant"])


def masters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 8), (8, 4), (3,)]
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def gradients(steps: int) -> Iterator[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield [torch.randn(master.shape, generator=generator, dtype=torch.float64) for master in masters()]


def by_the_book(weight_decay: float, rates: list[float]) -> list[Tensor]:
    """Loshchilov and Hutter (2019), algorithm 2, written out."""
    weights = [master.detach().clone() for master in masters()]
    means = [torch.zeros_like(weight) for weight in weights]
    squares = [torch.zeros_like(weight) for weight in weights]
    for step, (rate, grads) in enumerate(zip(rates, gradients(len(rates)), strict=True), start=1):
        for weight, mean, square, grad in zip(weights, means, squares, grads, strict=True):
            mean.mul_(BETAS[0]).add_((1 - BETAS[0]) * grad)
            square.mul_(BETAS[1]).add_((1 - BETAS[1]) * grad**2)
            update = (mean / (1 - BETAS[0] ** step)) / ((square / (1 - BETAS[1] ** step)).sqrt() + EPS)
            weight.sub_(rate * update + rate * weight_decay * weight)
    return weights


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_the_papers_and_torchs(weight_decay: float) -> None:
    rates = [1e-2, 5e-3, 0.0, 2e-2, 1e-3]
    ours, theirs = masters(), masters()
    optimizer = AdamW(ours, weight_decay)
    plain = torch.optim.AdamW(
        theirs, lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay, foreach=False
    )
    for rate, grads in zip(rates, gradients(len(rates)), strict=True):
        plain.param_groups[0]["lr"] = rate
        for mine, peer, grad in zip(ours, theirs, grads, strict=True):
            mine.grad, peer.grad = grad.clone(), grad.clone()
        optimizer.step(rate)
        plain.step()
    for mine, peer, book in zip(ours, theirs, by_the_book(weight_decay, rates), strict=True):
        torch.testing.assert_close(mine.detach(), book, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(mine, peer, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_has_torchs_bits_and_names(weight_decay: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = [(8, 33), (5,), (3, 4), (7, 7)]
    ours, theirs = (
        [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]
        for _ in range(2)
    )
    for mine, peer in zip(ours, theirs, strict=True):
        mine.data.copy_(peer.data)
    optimizer = AdamW(ours, weight_decay)
    plain = torch.optim.AdamW(theirs, betas=BETAS, eps=EPS, weight_decay=weight_decay, foreach=True)
    for step in range(9):
        plain.param_groups[0]["lr"] = rate = 3e-3 / (step + 1)
        for number, (mine, peer) in enumerate(zip(ours, theirs, strict=True)):
            # the last has no gradient in every third step, and its own count of steps
            gives = number < 3 or step % 3
            peer.grad = torch.randn(peer.shape, generator=generator, dtype=dtype) if gives else None
            mine.grad = peer.grad
        optimizer.step(rate)
        plain.step()
        assert all(map(torch.equal, ours, theirs))
    for mine, peer in zip(ours, theirs, strict=True):
        assert optimizer.state[mine].keys() == plain.state[peer].keys()
        for name, value in optimizer.state[mine].items():
            assert torch.equal(value, plain.state[peer][name])
    optimizer.zero_grad()
    assert all(mine.grad is None for mine in ours)


@pytest.mark.parametrize("num_steps", [1, 2, 7, 100])
def test_linear_without_warmup_is_transformers_linear_schedule(num_steps: int) -> None:
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2e-4)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 0, num_steps)
    for step in range(num_steps):
        theirs = optimizer.param_groups[0]["lr"]
        assert learning_rate(step, num_steps, 2e-4, "linear", 0) == pytest.approx(theirs, rel=1e-12), step
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("warmup", [0, 10])
def test_cosine_is_half_a_wave_that_ends_near_zero(warmup: int) -> None:
    rates = [learning_rate(step, 1010, 1.0, "cosine", warmup) for step in range(1010)]
    assert rates[warmup] == 1.0
    assert rates[-1] < 1e-5
    assert rates[warmup + (1010 - warmup) // 2] == pytest.approx(0.5, abs=1e-9)
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


def test_warmup_rises_evenly_from_above_zero_to_the_peak() -> None:
    assert [learning_rate(step, 100, 1.0, "constant", 4) for step in range(6)] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    )


def test_constant_stays() -> None:
    assert {learning_rate(step, 50, 3e-4, "constant", 0) for step in range(50)} == {3e-4}


@given(
    st.integers(1, 10_000), st.floats(0, 20_000), st.floats(1e-12, 1, exclude_max=True), SCHEDULES, st.data()
)
def test_every_step_has_a_rate_above_zero_and_up_to_the_peak(
    num_steps: int, warmup: float, peak: float, schedule: Schedule, data: st.DataObject
) -> None:
    steps = TrainSection(warmup=warmup).warmup_steps(num_steps)
    assert 0 <= steps < num_steps
    step = data.draw(st.integers(0, num_steps - 1))
    assert 0 < learning_rate(step, num_steps, peak, schedule, steps) <= peak
    assert learning_rate(steps, num_steps, peak, schedule, steps) == peak


def test_warmup_is_a_share_below_one_and_else_steps() -> None:
    assert [TrainSection(warmup=value).warmup_steps(200) for value in (0, 0.03, 0.001, 1, 5, 500)] == [
        0,
        6,
        1,
        1,
        5,
        199,
    ]
    assert TrainSection(warmup=0.5).warmup_steps(1) == 0
