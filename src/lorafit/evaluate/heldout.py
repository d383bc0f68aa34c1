"""Held-out loss: the mean cross-entropy over the supervised tokens of rows that training never sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafit.data.packing import BLANK, Pack, prefix_keys, spread
from lorafit.model.attention import PackedDocuments
from lorafit.model.llama import Llama
from lorafit.model.loss import loss_sum

FILL = 16


def pack_loss(network: Llama, pack: Pack) -> Tensor:
    """Sum of the cross-entropy over a pack's supervised tokens, a scalar on the network's device.

    A last document without targets fills the pass up to a multiple of FILL tokens: passes of the same size use the
    memory that the ones before freed, and products that are compiled for a size are compiled less often.
    """
    device = network.lm_head.weight.device
    ids, index, lengths = torch.from_numpy(pack.ids), torch.from_numpy(pack.index), pack.lengths
    if filler := -len(ids) % FILL:
        index = torch.cat([index, torch.arange(len(ids), len(ids) + filler)])
        ids, lengths = F.pad(ids, (0, filler)), (*lengths, filler)
    keys = None
    if network.training and device.type == "cpu":
        keys = torch.empty_like(ids)
        keys[index] = torch.from_numpy(prefix_keys(ids[index].numpy(), lengths))
    attend = PackedDocuments(lengths, device, index)
    predict = torch.from_numpy(pack.predict).to(device)
    supervised = network.hidden(ids.to(device), attend, predict, keys)
    targets = torch.from_numpy(pack.targets).to(device)
    return loss_sum(network.model.norm(supervised), network.lm_head.weight, targets)


class Ranks(Protocol):
    """Processes that measure together."""

    rank: int
    world_size: int

    def sum(self, values: Sequence[float]) -> list[float]: ...


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
    was_training = network.training
    network.eval()
    rank, world_size = (ranks.rank, ranks.world_size) if ranks is not None else (0, 1)
    lockstep = engine is not None and engine.lockstep
    shares = spread([len(pack.ids) for pack in packs], world_size)
    own, losses = shares[rank], [0.0] * len(packs)
    with (
        torch.no_grad() if lockstep else torch.inference_mode()
    ):  # weights gathered in a pass serve training too
        for done, at in enumerate(own, 1):
            losses[at] = float(pack_loss(network, packs[at]))
            if progress is not None:
                progress(done, len(own))
        for _ in range(max(map(len, shares)) - len(own) if lockstep else 0):
            pack_loss(network, BLANK)
    network.train(was_training)
    if ranks is not None:
        losses = ranks.sum(losses)
    return sum(losses) / max(1, sum(len(pack.targets) for pack in packs))
