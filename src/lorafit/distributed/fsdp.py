"""Shards the frozen base over the ranks with torch's `fully_shard` (FSDP2), for a base larger than one device."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from lorafit.model.llama import Llama
from lorafit.model.quant import QuantizedLinear


def shard_base(network: Llama, device: torch.device) -> None:
    """Give each rank an equal part of every layer's weights, on `device`; the adapter stays whole on all ranks.

    A layer's weights are gathered before it computes, forward and backward, and freed after. Embedding, final norm
    and head are one further part, which stays gathered during a whole pass. The weights may be on the CPU before,
    mapped to their files: the layers move one by one, so no device holds all of them.
    """
    adapter_parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in adapter_parameters:
        parameter.data = parameter.data.to(device)
    for module in network.modules():
        if isinstance(module, QuantizedLinear):
            for name, buffer in list(
                module.named_buffers(recurse=False)
            ):  # `fully_shard` shards parameters only
                delattr(module, name)
                module.register_parameter(name, nn.Parameter(buffer, requires_grad=False))
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    ignored = set(adapter_parameters)
    for layer in network.decoder.layers:
        fully_shard(layer, mesh=mesh, ignored_params=ignored)
    fully_shard(network, mesh=mesh, ignored_params=ignored)
    for method in ("hidden", "logits"):
        register_fsdp_forward_method(network, method)
