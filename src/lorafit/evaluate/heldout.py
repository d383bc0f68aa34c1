"""Held-out loss: the mean cross-entropy over the supervised tokens of rows that training never sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lorafit.data.packing import Pack
from lorafit.model.attention import PackedDocuments
from lorafit.model.llama import Llama
from lorafit.model.loss import loss_sum


def pack_loss(network: Llama, pack: Pack) -> Tensor:
    """Sum of the cross-entropy over a pack's supervised tokens, a scalar on the network's device."""
    device = network.lm_head.weight.device
    attend = PackedDocuments(pack.lengths, device)
    predict = torch.from_numpy(pack.predict).to(device)
    supervised = network.hidden(torch.from_numpy(pack.ids).to(device), attend, predict)
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
