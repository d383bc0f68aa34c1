"""Held-out loss: the mean cross-entropy over the supervised tokens of rows that training never sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafit.data.packing import Pack
from lorafit.model.attention import PackedDocuments
from lorafit.model.llama import Llama
from lorafit.model.loss import loss_sum

FILL = 32


def pack_loss(network: Llama, pack: Pack) -> Tensor:
    """Sum of the cross-entropy over a pack's supervised tokens, a scalar on the network's device.

    A last document without targets fills the pass up to a multiple of FILL tokens: passes of the same size use the
    memory that the ones before freed, and products that are compiled for a size are compiled less often.
    """
    device = network.lm_head.weight.device
    ids, lengths = torch.from_numpy(pack.ids), pack.lengths
    if filler := -len(ids) % FILL:
        ids, lengths = F.pad(ids, (0, filler)), (*lengths, filler)
    attend = PackedDocuments(lengths, device)
    predict = torch.from_numpy(pack.predict).to(device)
    supervised = network.hidden(ids.to(device), attend, predict)
    targets = torch.from_numpy(pack.targets).to(device)
    return loss_sum(network.model.norm(supervised), network.lm_head.weight, targets)


def heldout_loss(
    network: Llama, packs: Sequence[Pack], progress: Callable[[int, int], None] | None = None
) -> float:
    """Mean loss over all supervised tokens of `packs`; dropout off, nothing of the network changes."""
    was_training = network.training
    network.eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for done, pack in enumerate(packs, 1):
            total += float(pack_loss(network, pack))
            count += len(pack.targets)
            if progress is not None:
                progress(done, len(packs))
    network.train(was_training)
    return total / max(1, count)
