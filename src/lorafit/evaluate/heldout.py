"""Held-out loss: the mean cross-entropy over the supervised tokens of rows that are not trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lorafit.data.batch import balance
from lorafit.data.packing import EMPTY_PACK, Pack
from lorafit.distributed.parallel import Engine
from lorafit.distributed.ranks import Ranks
from lorafit.forward import Below, pack_loss
from lorafit.model.llama import Llama
from lorafit.model.lora import evaluating


def heldout_loss(
    network: Llama,
    packs: Sequence[Pack],
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks | None = None,
    engine: Engine | None = None,
    below: Below | None = None,
) -> float:
    """Mean (weighted) loss over all supervised tokens of `packs`, without dropout. The network does not change.

    With `ranks`, each computes some of the packs, and the result has the same bits: every rank adds the losses in the
    order of the packs. With an `engine` in lockstep, all ranks make the same number of passes. `below` keeps what the
    layers below the adapter compute.
    """
    lockstep = engine is not None and engine.lockstep
    rank, world_size = (ranks.rank, ranks.world_size) if ranks is not None else (0, 1)
    shares = balance([len(pack.ids) for pack in packs], world_size)
    own, losses = shares[rank], [0.0] * len(packs)
    # no_grad, not inference_mode: training too uses the weights that FSDP gathers in a pass
    with evaluating(network), torch.no_grad() if lockstep else torch.inference_mode():
        for done, index in enumerate(own, 1):
            losses[index] = float(pack_loss(network, packs[index], below))
            if progress is not None:
                progress(done, len(own))
        for _ in range(max(map(len, shares)) - len(own) if lockstep else 0):
            pack_loss(network, EMPTY_PACK)
    if ranks is not None:
        losses = ranks.all_reduce_sum(losses)
    return sum(losses) / (sum(pack.weight for pack in packs) or 1)
