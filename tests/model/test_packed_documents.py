"""Documents in one pack never see each other: not a bit of logits or gradients changes with a neighbour."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import FAMILIES, random_network
from torch import Tensor

from lorafit.model.attention import PackedDocuments, causal_attention, has_flash
from lorafit.model.lora import LoraSpec, attach
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


@pytest.mark.parametrize("window", [None, 20])
def test_documents_side_by_side_equal_documents_one_by_one(window: int | None) -> None:
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
    side_by_side = documents._side_by_side(q, k, v, window)
    torch.testing.assert_close(side_by_side, one_by_one, rtol=1e-12, atol=1e-12)
    slopes = [torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (side_by_side, one_by_one)]
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-12)


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
