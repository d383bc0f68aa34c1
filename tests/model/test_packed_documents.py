"""Documents in one pack never see each other: not a bit of logits or gradients changes with a neighbour."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.tiny_models import FAMILIES, HYBRIDS, random_network
from torch import Tensor

from lorafit.data.packing import Packer, TokenRow
from lorafit.forward import pack_loss
from lorafit.model.attention import PackedDocuments, causal_attention, has_flash
from lorafit.model.llama import Llama
from lorafit.model.lora import LoraSpec, adapted, attach
from lorafit.model.loss import loss_sum

LENGTHS = [11, 23, 7]
MIDDLE = slice(11, 34)


def logits_and_gradients(network: torch.nn.Module, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    for parameter in network.parameters():
        parameter.grad = None
    hidden = network.hidden(ids, PackedDocuments(LENGTHS))
    logits = network.logits(hidden)
    loss_sum(network.model.norm(hidden[MIDDLE]), network.lm_head.weight, ids[MIDDLE]).backward()
    gradients = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    return logits[MIDDLE].detach(), gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen3"])
def test_changing_the_neighbours_changes_no_bit(family: str, dtype: torch.dtype) -> None:
    network = random_network(family, dtype=dtype)
    attach(network, LoraSpec(4, 8.0, 0.0, ("all-linear",), False), seed=0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.1)
    ids = torch.randint(0, 256, (sum(LENGTHS),))
    other = ids.clone()
    other[:11] = torch.randint(0, 256, (11,))
    other[34:] = torch.randint(0, 256, (7,))
    logits, gradients = logits_and_gradients(network, ids)
    logits_other, gradients_other = logits_and_gradients(network, other)
    assert torch.equal(logits, logits_other)
    assert len(gradients) == 28
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_other, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_equals_its_documents_alone(family: str) -> None:
    network = random_network(family, dtype=torch.float64)
    ids = torch.randint(0, 256, (sum(LENGTHS),))
    packed = network.hidden(ids, PackedDocuments(LENGTHS))
    alone = torch.cat([network.hidden(part, PackedDocuments([len(part)])) for part in ids.split(LENGTHS)])
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-12)


def test_positions_start_over_in_every_document() -> None:
    assert PackedDocuments([3, 1, 2]).positions.tolist() == [0, 1, 2, 0, 0, 1]
    shared = PackedDocuments([3, 4, 2], index=torch.tensor([0, 1, 2, 0, 1, 3, 4, 0, 5]))
    assert shared.positions.tolist() == [0, 1, 2, 2, 3, 1]


# Two that begin alike, one that is another's beginning, one twice, one within those, one of its own.
BEGINNINGS = [range(40), [*range(35), *range(60, 130)], range(20), range(40), [*range(70), 9, 9], [3, 200, 1]]


def loss_and_gradients(network: Llama, rows: list[TokenRow], packing: bool) -> list[Tensor]:
    for parameter in network.parameters():
        parameter.grad = None
    torch.manual_seed(3)
    state = torch.get_rng_state()
    losses = []
    for pack in Packer(1000, packing).packs(rows):
        torch.set_rng_state(state)  # as in a step
        losses.append(pack_loss(network, pack))
        losses[-1].backward()
    return [torch.stack(losses).sum().detach()] + [
        p.grad.clone() for p in network.parameters() if p.grad is not None
    ]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-11), (torch.float32, 2e-5), (torch.bfloat16, 0.02)],
    ids=["float64", "float32", "bfloat16"],
)
@pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen3", *HYBRIDS])
def test_what_rows_share_gives_the_loss_and_gradients_of_each_alone(
    family: str, dtype: torch.dtype, tolerance: float, dropout: float
) -> None:
    """In float64 torch attends; the compiled kernels do in the two others, in their three ways."""
    network = random_network(family, dtype=dtype, head_dim=32).train()
    attach(network, LoraSpec(4, 8.0, dropout, ("all-linear",), False), seed=0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.1)
    rows = [(np.array(ids, np.uint16), np.arange(len(ids)) >= len(ids) // 3) for ids in BEGINNINGS]
    (pack,) = Packer(1000).packs(rows)
    assert len(pack.ids) < 0.6 * sum(pack.lengths)
    together, alone = (loss_and_gradients(network, rows, packing) for packing in (True, False))
    assert len(together) == 1 + 2 * len(adapted(network))
    for one, other in zip(together, alone, strict=True):
        assert float((one - other).norm()) <= tolerance * float(other.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_shared_beginning_changes_no_bit_of_a_document(dtype: torch.dtype) -> None:
    network = random_network("llama", dtype=dtype, head_dim=32)
    ids = torch.randint(0, 256, (96,))
    # 64 tokens twice, once with 32 others behind them: as one pass of 160 tokens and as one of 96
    apart = network.hidden(torch.cat([ids[:64], ids]), PackedDocuments([64, 96]))[64:]
    index = torch.cat([torch.arange(64), torch.arange(96)])
    assert torch.equal(network.hidden(ids, PackedDocuments([64, 96], index=index)), apart)


def test_shared_tokens_go_to_each_document_also_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU without flash attention: out and slopes are those of one document after the other."""
    torch.manual_seed(0)
    lengths, index = [70, 66, 5], torch.tensor([*range(70), *range(60), *range(70, 76), *range(5)])
    shapes = [(76, 4, 8), (76, 2, 8), (76, 2, 8)]
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    rotary = (torch.randn(76, 4), torch.randn(76, 4))
    found = []
    for way in (PackedDocuments._attend, PackedDocuments._batched):
        monkeypatch.setattr(PackedDocuments, "_attend", way)
        out = PackedDocuments(lengths, index=index)(0, q, k, v, rotary, None)
        assert out.shape == q.shape
        found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("window", [None, 20])
def test_documents_batched_equal_documents_one_by_one(window: int | None) -> None:
    torch.manual_seed(0)
    lengths = [70, 3, 64, 1, 65, 200, 3]
    tokens = sum(lengths)
    q = torch.randn(tokens, 4, 8, dtype=torch.float64, requires_grad=True)
    k = torch.randn(tokens, 2, 8, dtype=torch.float64, requires_grad=True)
    v = torch.randn(tokens, 2, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(tokens, 4, 8, dtype=torch.float64)
    documents = PackedDocuments(lengths)
    one_by_one = torch.cat(
        [
            causal_attention(*parts, window)
            for parts in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        ]
    )
    side_by_side = documents._batched(q, k, v, window)
    torch.testing.assert_close(side_by_side, one_by_one, rtol=1e-12, atol=1e-12)
    grad_outputs = [
        torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (side_by_side, one_by_one)
    ]
    torch.testing.assert_close(*grad_outputs, rtol=1e-12, atol=1e-12)


def test_flash_attention_is_asked_for_what_it_can() -> None:
    assert not has_flash(torch.zeros(1, 1, 64, dtype=torch.bfloat16))  # on the CPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 20])
def test_flash_attention_equals_documents_one_by_one(window: int | None) -> None:
    torch.manual_seed(0)
    lengths = [70, 3, 64, 1, 65, 200, 3]
    shapes = [(4, 64), (2, 64), (2, 64)]
    q, k, v = (torch.randn(sum(lengths), *shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    if not has_flash(q):
        pytest.skip("this chip has no flash attention")
    exact = [
        causal_attention(*(x.double() for x in parts), window)
        for parts in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    ]
    out = PackedDocuments(lengths, "cuda")._flash(q, k, v, window)
    torch.testing.assert_close(out.double(), torch.cat(exact), rtol=2**-6, atol=2**-6)
