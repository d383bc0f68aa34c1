"""Documents of one pass do not affect each other, in training and in generation (bugs 4, 5)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tests.bugs.catalogue import probe
from tests.bugs.lab import Lab, Plant, stir
from tests.tiny_models import random_network

from lorafit.data.packing import build_pack
from lorafit.forward import pack_loss
from lorafit.infer import engine
from lorafit.infer.continuous_batch import Request, generate_tokens
from lorafit.model import attention
from lorafit.model.attention import PackedDocuments
from lorafit.model.llama import Llama
from lorafit.model.lora import LoraSpec, attach
from lorafit.model.native import kernels

BACKENDS = ("compiled", "one by one", "side by side")
_ONE_DOCUMENT = "(x.split([len(x)]) for x in tensors)"


class _SideBySide(PackedDocuments):
    """The attention of a CUDA device without flash attention, on the CPU."""

    def _attend(self, q, k, v, window):  # type: ignore[no-untyped-def]
        return self._batched(q, k, v, window)


def _use(lab: Lab, backend: str) -> None:
    """Select the attention of packs. Raises AssertionError for `compiled` without a compiler."""
    if backend == "compiled":
        assert kernels() is not None, "no C++ compiler"
        return
    lab.patch.setattr(attention, "fits", lambda *tensors: False)
    if backend == "side by side":
        lab.patch.setattr("lorafit.forward.PackedDocuments", _SideBySide)


def _network(family: str, dtype: torch.dtype) -> Llama:
    network = random_network(family, dtype=dtype, head_dim=16)
    attach(network, LoraSpec(4, 8.0, 0.0, ("all-linear",), False), seed=0)
    stir(network)
    return network.train()


def _packed(network: Llama, lengths: Sequence[int], neighbour: int) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of the middle row of a pack of three; `neighbour` seeds the other two."""
    rows = []
    for number, length in enumerate(lengths):
        ids = np.random.default_rng(7 if number == 1 else [neighbour, number]).integers(0, 250, length)
        rows.append((ids.astype(np.uint16), np.full(length, number == 1)))
    pack = build_pack(rows)
    assert len(pack.lengths) == 3
    for parameter in network.parameters():
        parameter.grad = None
    loss = pack_loss(network, pack)
    loss.backward()
    return float(loss), [p.grad.clone() for p in network.parameters() if p.grad is not None]


@probe(
    4,
    Plant(
        "model.attention:PackedDocuments.__call__",
        "documents = self.starts,",
        "documents = self.starts[[0, -1]],",
    ),
    Plant(
        "model.attention:PackedDocuments._documents",
        "(x.split(self.lengths) for x in tensors)",
        _ONE_DOCUMENT,
    ),
    Plant(
        "model.attention:PackedDocuments._batched",
        "groups_on(self.starts,",
        "groups_on(self.starts[[0, -1]],",
    ),
)
def a_row_does_not_depend_on_its_pack(lab: Lab) -> None:
    """Other tokens in the other rows change no bit of a row's loss or gradients, with every kind of attention."""
    for backend in BACKENDS:
        with lab.patch.context() as patch:
            _use(Lab(lab.folder, patch), backend)
            for family, dtype in (("llama", torch.float32), ("mistral-window", torch.bfloat16)):
                network = _network(family, dtype)
                (one, gradients), (two, others) = (
                    _packed(network, [90, 23, 7], neighbour) for neighbour in (1, 2)
                )
                where = f"{backend}, {family}"
                assert one == two, where
                assert gradients, where
                assert all(map(torch.equal, gradients, others)), where


@probe(
    5,
    Plant("infer.engine:decode_attention", "attn_mask=visible[:, None, None]", "attn_mask=None"),
    Plant(
        "infer.engine:Decode.__call__",
        "slots_and_positions = (self.cache.slots, self.positions)",
        "slots_and_positions = (self.cache.slots, self.positions.max().expand(rows).contiguous())",
    ),
    Plant("infer.engine:Prefill.__call__", "super().__call__(", "PackedDocuments([sum(self.lengths)])("),
)
def an_answer_does_not_depend_on_its_batch(lab: Lab) -> None:
    """Prompts of other lengths in the batch change no token of an answer, with and without compiled kernels."""
    prompts = [[3, 5, 8, 13, 21, 34], [2, 4], list(range(60, 100))]
    for compiled in (True, False):
        with lab.patch.context() as patch:
            if not compiled:
                patch.setattr(engine, "fits", lambda *tensors: False)
                patch.setattr(attention, "fits", lambda *tensors: False)
            for family in ("llama", "mistral-window"):
                network = _network(family, torch.float32).eval()
                alone = [_answers(network, [prompt])[0] for prompt in prompts]
                assert _answers(network, prompts) == alone, f"{family}, compiled={compiled}"


def _answers(network: Llama, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in prompts]
    for row, token in generate_tokens(network, [Request(prompt, frozenset(), 12) for prompt in prompts]):
        answers[row].append(token.id)
    return answers
