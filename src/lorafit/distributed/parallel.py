"""How a pass is computed and its gradient reduced: in one process, or by DistributedDataParallel over the adapter."""

import contextlib  # no annotations of the future here: torch reads those of the communication hook
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lorafit.data.packing import Pack
from lorafit.model.llama import Llama

Losses = tuple[Tensor, Tensor]  # of a pack: their sum, and that of each target
Compute = Callable[[Llama, Pack], Losses]
BUCKET_MIB = 25  # torch's default: the first is sent during the backward pass


class Engine:
    """A single process: a pass is a plain call."""

    def __init__(self, network: Llama) -> None:
        self.network = network
        self.lockstep = False  # whether all ranks must compute each pass together
        self.reduced_bytes = 0  # of gradients, given to all-reduce by this rank so far

    def loss(self, compute: Compute, pack: Pack) -> Losses:
        """The losses of a pack. Call backward of the sum before the next pack."""
        return compute(self.network, pack)

    def accumulating(self) -> contextlib.AbstractContextManager[Any]:
        """Inside this context gradients are only accumulated locally; the pass outside it all-reduces them."""
        return contextlib.nullcontext()


class ReplicatedEngine(Engine):
    """Every rank has the adapter. Only the adapter's gradients are communicated.

    Gradients are summed, not averaged: the loss is already divided by the supervised tokens of all ranks. The ranks
    must start with the same adapter. With `sharded` the base is sharded on that device (distributed/fsdp.py): each
    pass gathers it layer by layer.
    """

    def __init__(self, network: Llama, sharded: torch.device | None = None) -> None:
        super().__init__(network)
        if sharded is not None:
            from lorafit.distributed.fsdp import shard_base  # imports much of torch that no other run needs

            shard_base(network, sharded)
            self.lockstep = True
        passes = _PassLoss(network)
        # The weights of a quantised base are buffers, which DDP broadcasts before every synchronised pass by default.
        # Its switch for that, broadcast_buffers, warns in torch 2.13; this list works in all versions.
        frozen = [name for name, parameter in passes.named_parameters() if not parameter.requires_grad]
        frozen += [name for name, _ in passes.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(passes, frozen)
        self._module = DistributedDataParallel(
            passes, init_sync=False, bucket_cap_mb=BUCKET_MIB, gradient_as_bucket_view=True
        )
        self._module.register_comm_hook(None, self._summed)

    def loss(self, compute: Compute, pack: Pack) -> Losses:
        losses: Losses = self._module(compute, pack)
        return losses

    def accumulating(self) -> contextlib.AbstractContextManager[Any]:
        return self._module.no_sync()

    def _summed(self, _: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        gradient = bucket.buffer()
        self.reduced_bytes += gradient.numel() * gradient.element_size()
        work = dist.all_reduce(gradient, async_op=True)
        assert work is not None
        future: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
        return future


class _PassLoss(nn.Module):
    """A pass as a module, whose forward DistributedDataParallel wraps."""

    def __init__(self, network: Llama) -> None:
        super().__init__()
        self.network = network

    def forward(self, compute: Compute, pack: Pack) -> Losses:
        loss, each = compute(self.network, pack)
        return loss if pack.num_tokens else loss * 0.0, each
