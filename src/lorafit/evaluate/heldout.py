"""Held-out loss: the mean cross-entropy over the supervised tokens of rows that training never sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

import torch

from lorafit.data.batch import balance
from lorafit.data.packing import EMPTY_PACK, Pack
from lorafit.forward import pack_loss
from lorafit.model.llama import Llama
from lorafit.model.lora import evaluating


class Ranks(Protocol):
    """Processes that measure together."""

    rank: int
    world_size: int

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]: ...


class Engine(Protocol):
    """How they compute: with `lockstep` all make each pass together."""

    lockstep: ClassVar[bool]


def heldout_loss(
    network: Llama,
    packs: Sequence[Pack],
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks | None = None,
    engine: Engine | None = None,
) -> float:
    """Mean loss over all supervised tokens of `packs`; dropout off, nothing of the network changes.

    With `ranks` each computes some of the packs, and the number is the same to the last bit: the losses of the packs
    are added up in their order on every rank.
    """
    rank, world_size = (ranks.rank, ranks.world_size) if ranks is not None else (0, 1)
    lockstep = engine is not None and engine.lockstep
    shares = balance([len(pack.ids) for pack in packs], world_size)
    own, losses = shares[rank], [0.0] * len(packs)
    # no_grad, not inference_mode: weights that FSDP gathers in a pass are used by training too
    with evaluating(network), torch.no_grad() if lockstep else torch.inference_mode():
        for done, at in enumerate(own, 1):
            losses[at] = float(pack_loss(network, packs[at]))
            if progress is not None:
                progress(done, len(own))
        for _ in range(max(map(len, shares)) - len(own) if lockstep else 0):
            pack_loss(network, EMPTY_PACK)
    if ranks is not None:
        losses = ranks.all_reduce_sum(losses)
    return sum(losses) / max(1, sum(len(pack.targets) for pack in packs))
