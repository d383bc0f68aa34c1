"""The chunked loss equals plain cross-entropy, in value and gradient, and holds no big table."""

from __future__ import annotations

import pytest
import torch

from lorafit.model import loss as loss_module
from lorafit.model.loss import loss_sum


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_equals_plain_cross_entropy(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 50 * 9 * 8)  # chunks of nine rows
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(50, 12, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 50, (rows,), generator=generator)
    ours = loss_sum(hidden, head, targets)
    (3 * ours).backward()
    assert hidden.grad is not None
    mine, hidden.grad = hidden.grad, None
    plain = torch.nn.functional.cross_entropy(hidden @ head.T, targets, reduction="sum")
    (3 * plain).backward()
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(mine, hidden.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1 / 997, 1 / 3, 65536 / 997])
def test_the_incoming_scale_is_not_rounded_to_16_bits(dtype: torch.dtype, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 16, generator=generator, dtype=torch.float32).to(dtype).requires_grad_()
    head = torch.randn(50, 16, generator=generator, dtype=torch.float32).to(dtype)
    total = loss_sum(hidden, head, torch.randint(0, 50, (64,), generator=generator))
    (whole,) = torch.autograd.grad(total, hidden, retain_graph=True)
    (scaled,) = torch.autograd.grad(total * scale, hidden)
    torch.testing.assert_close(scaled, (whole.float() * scale).to(dtype), rtol=0, atol=0)
    ratio = float(scaled.double().norm() / whole.double().norm()) / scale
    assert ratio == pytest.approx(
        1, abs=4e-4
    )  # the roundings of single numbers cancel; that of the scale does not


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.full((2, 4), 300.0, requires_grad=True)
    head = torch.tensor([[1.0] * 4, [-1.0] * 4])
    total = loss_sum(hidden, head, torch.tensor([0, 1]))
    total.backward()
    assert hidden.grad is not None
    assert torch.isfinite(total)
    assert torch.isfinite(hidden.grad).all()


def test_no_table_of_all_tokens_times_the_vocabulary() -> None:
    """Allocations during forward and backward stay below a quarter of such a table in float32."""
    rows, vocab, width = 8192, 8192, 8
    hidden = torch.randn(rows, width, requires_grad=True)
    head = torch.randn(vocab, width)
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as profile:
        loss_sum(hidden, head, torch.zeros(rows, dtype=torch.int64)).backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < rows * vocab * 4 / 2
