"""Loss weights: the loss and the gradient of a step do not depend on how it is cut, packed or divided over ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.runs import digest, events, tiny_run, tiny_settings
from tests.tiny_models import random_network

from lorafit.data.batch import RankShare
from lorafit.data.packing import Packer, TokenRow, build_pack
from lorafit.forward import document_sums, pack_loss, pack_losses
from lorafit.model.lora import LoraSpec, adapted, attach
from lorafit.model.loss import loss_sum

VOCAB = 40
WEIGHTS = (0.0, 1.0, 0.5, 2.0, 0.125)


@st.composite
def token_rows(draw: st.DrawFn) -> list[TokenRow]:
    """Rows of which some share their beginning; masks, or weights; each has a trained token."""
    rows: list[TokenRow] = []
    start = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=4))
    for _ in range(draw(st.integers(1, 5))):
        ids = start[: draw(st.integers(1, len(start)))] + draw(
            st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=9)
        )
        weights = [
            0.0,
            *(draw(st.sampled_from(WEIGHTS)) for _ in ids[2:]),
            draw(st.sampled_from(WEIGHTS[1:])),
        ]
        told: Any = np.array(weights, dtype=np.float32)
        rows.append((np.array(ids, dtype=np.uint16), told if draw(st.booleans()) else told > 0))
    return rows


@pytest.fixture(scope="module")
def network() -> Any:
    made = random_network(dtype=torch.float64, vocab_size=VOCAB)
    attach(made, LoraSpec(2, 4, 0.0, ("all-linear",), False), seed=0)
    with torch.no_grad():
        for number, layer in enumerate(adapted(made).values()):
            layer.lora_B.copy_(
                0.1 * torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(number))
            )
    return made


def step(
    network: Any, rows: list[TokenRow], packer: Packer, world_size: int
) -> tuple[float, dict[str, torch.Tensor]]:
    """(loss, gradient) of a step over all ranks, as the loop computes them."""
    for layer in adapted(network).values():
        layer.lora_A.grad = layer.lora_B.grad = None

    class Held:
        def row(self, index: int) -> TokenRow:
            return rows[index]

    total = 0.0
    for rank in range(world_size):
        batch = RankShare(rank, world_size).of(Held(), np.arange(len(rows)), packer)
        for pack in batch.packs:
            loss = pack_loss(network, pack) * bool(pack.num_tokens)  # 0 for a rank without rows
            (loss * (1 / batch.weight)).backward()
            total += float(loss.detach())
    grads = {name: layer.lora_B.grad.clone() for name, layer in adapted(network).items()}
    return total / batch.weight, grads


@settings(max_examples=30)
@given(rows=token_rows(), capacity=st.integers(8, 60), packing=st.booleans(), world_size=st.integers(1, 3))
def test_any_cut_of_a_step_is_the_whole_step(
    network: Any, rows: list[TokenRow], capacity: int, packing: bool, world_size: int
) -> None:
    whole, gradient = step(network, rows, Packer(10_000), 1)
    cut, other = step(network, rows, Packer(capacity, packing), world_size)
    assert cut == pytest.approx(whole, rel=1e-9)
    for name, expected in gradient.items():
        torch.testing.assert_close(other[name], expected, rtol=1e-7, atol=1e-12)
    by_hand, weight = 0.0, 0.0
    for ids, told in rows:
        pack = build_pack([(ids, np.ones(len(ids), dtype=np.bool_))])
        with torch.no_grad():
            for at in range(1, len(ids)):
                one = np.zeros(len(ids), dtype=np.bool_)
                one[at] = True
                by_hand += float(told[at]) * float(pack_loss(network, build_pack([(ids, one)])))
        assert pack.weights is None
        weight += float(told[1:].sum())
    assert whole == pytest.approx(by_hand / weight, rel=1e-9)


@settings(max_examples=20)
@given(rows=token_rows(), capacity=st.integers(8, 64))
def test_the_parts_of_a_loss_are_those_of_its_rows_with_their_gradients(
    network: Any, rows: list[TokenRow], capacity: int
) -> None:
    factors = torch.arange(1.0, len(rows) + 1, dtype=torch.float64)
    layer = next(iter(adapted(network).values())).lora_A
    of_parts, of_rows = torch.zeros_like(layer), torch.zeros_like(layer)
    for pack in Packer(capacity).packs(rows):
        total, parts = pack_losses(network, pack)
        sums = document_sums(parts, pack)
        assert float(sums.detach().sum()) == pytest.approx(float(total.detach()), abs=1e-9)
        for row, found in zip(pack.rows, sums.detach(), strict=True):
            alone = float(pack_loss(network, build_pack([rows[row]])).detach())
            assert float(found) == pytest.approx(alone, abs=1e-9)
        of_parts += torch.autograd.grad((sums * factors[torch.from_numpy(pack.rows)]).sum(), layer)[0]
    for row, factor in zip(rows, factors, strict=True):
        of_rows += torch.autograd.grad(pack_loss(network, build_pack([row])) * factor, layer)[0]
    torch.testing.assert_close(of_parts, of_rows, rtol=1e-9, atol=1e-10)


@given(rows=token_rows())
def test_weights_of_one_are_no_weights(rows: list[TokenRow]) -> None:
    pack = build_pack([(ids, told > 0) for ids, told in rows])
    assert pack.weights is None
    assert pack.weight == len(pack.targets)
    weighted = build_pack([(ids, (told > 0).astype(np.float32)) for ids, told in rows])
    assert weighted.weights is not None
    assert weighted.weight == pack.weight
    np.testing.assert_array_equal(weighted.ids, pack.ids)
    np.testing.assert_array_equal(weighted.targets, pack.targets)


def test_the_weighted_loss_and_its_gradient_are_those_of_torch(network: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(9, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(VOCAB, 12, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, VOCAB, (9,), generator=generator)
    weights = torch.rand(9, generator=generator)
    loss_sum(hidden, head, targets, weights).backward()
    mine, hidden.grad = hidden.grad, None
    plain = (F.cross_entropy(hidden @ head.T, targets, reduction="none") * weights).sum()
    plain.backward()
    assert mine is not None
    assert hidden.grad is not None
    torch.testing.assert_close(mine, hidden.grad, rtol=1e-10, atol=1e-12)


def rows_of(folder: Path, **keys: Any) -> str:
    rows = [{"instruction": f"Say {n}.", "output": f"It is {n}.", **keys} for n in range(24)]
    path = folder / f"rows-{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps(rows))
    return f"data.path={path}"


def test_runs_with_weights(tmp_path: Path) -> None:
    """Weights that are all alike change nothing; the same rows with other weights train something else."""
    common = tiny_settings(tmp_path, "train.max_steps=2", "data.holdout=0")
    results = {
        name: tiny_run(common, tmp_path / name, rows_of(tmp_path, **keys))
        for name, keys in {
            "plain": {},
            "one": {"weight": 1},
            "true": {"train": True},
            "half": {"weight": 0.5},
        }.items()
    }
    assert digest(results["plain"]) == digest(results["one"]) == digest(results["true"])
    plain, half = (events(results[name], "step")[-1] for name in ("plain", "half"))
    assert half["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert half["supervised_tokens"] == plain["supervised_tokens"]
    ledger = json.loads((results["half"].path / "ledger.json").read_text())
    assert ledger["weights"] == {"0.5": 24}
    assert json.loads((results["true"].path / "ledger.json").read_text())["aliases"] == {
        "`train` as `weight`": 24
    }

    mixed = [{"instruction": f"Say {n}.", "output": f"It is {n}.", "weight": n % 3 / 2} for n in range(24)]
    (tmp_path / "mixed.json").write_text(json.dumps(mixed))
    path = f"data.path={tmp_path / 'mixed.json'}"
    one, cut = (tiny_run(common, tmp_path / str(n), path, f"train.micro_batch_tokens={n}") for n in (5000, 8))
    [a, b] = ([event["loss"] for event in events(result, "step")] for result in (one, cut))
    assert a == pytest.approx(b, rel=1e-5)
    assert a != pytest.approx([event["loss"] for event in events(results["plain"], "step")], rel=1e-4)
    ledger = json.loads((one.path / "ledger.json").read_text())
    assert ledger["dropped"]["its loss has weight 0"]["rows"] == 8
