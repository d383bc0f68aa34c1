"""A base larger than the device: its frozen layers stay in pinned host memory, and two at a time are on the device.

Layer i has its place in the buffer i % 2. The weight of each linear is a view of a buffer, so it holds the numbers of
the layer that was loaded last. While a layer computes, a second stream copies the next one into the other buffer:
forward in the order of the layers, backward in reverse.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorafit.config.schema import Offload
from lorafit.errors import ConfigError, ModelError
from lorafit.model.linear import Frozen
from lorafit.observe.units import memory_size

_PLACE = "model.offload"
_ALIGNED = 256  # bytes, as the allocator aligns tensors
_PINNED = 2**25  # bytes that are pinned together: torch rounds each up to a power of two


def check_offload(offload: Offload, device: torch.device, strategy: str) -> None:
    """Raise ConfigError if layers cannot be copied to `device`, or with this `distributed.strategy`."""
    if offload == "none":
        return
    if device.type != "cuda":
        what = f"layers are copied to a CUDA device, and this run computes on {device.type}"
        raise ConfigError(what, place=_PLACE, hint="leave it out: the base is in the host's memory already")
    if strategy == "fsdp":
        what = "layers are either sharded over the devices or kept in the host's memory"
        raise ConfigError(what, place=_PLACE, hint="leave it out, or use distributed.strategy=ddp")


def move_to_host(module: nn.Module) -> None:
    """Move the streamed weights of a linear to the host's memory; nothing for another module."""
    if isinstance(module, Frozen):
        for part in module.streamed:
            _put(module, part, getattr(module, part).detach().cpu())


class LayerStream:
    """The weights of all layers in pinned host memory, and the buffers of two layers on the device."""

    def __init__(self, layers: Sequence[nn.Module], device: torch.device) -> None:
        """Take the streamed weights of `layers`, which are in host memory; views of the buffers replace them.

        Raises ModelError where the host cannot pin so much.
        """
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._arrived = torch.cuda.Event(), torch.cuda.Event()
        self._present = [-1, -1]  # the layers in the buffers
        sizes = [sum(_rounded(getattr(*place).nbytes) for place in _places(layer)) for layer in layers]
        with torch.cuda.stream(self._stream):  # memory that is freed during a copy is reused after it
            self._buffers = [
                torch.empty(max(sizes[slot::2], default=0), dtype=torch.uint8, device=device)
                for slot in range(2)
            ]
        torch.cuda.current_stream(device).wait_stream(self._stream)
        try:
            self._host = [self._take(number, layer) for number, layer in enumerate(layers)]
        except RuntimeError as error:
            raise ModelError(
                f"the host cannot pin {memory_size(sum(sizes))} of memory: {str(error).splitlines()[0]}",
                place=_PLACE,
                hint="model.quantize=int8 or nf4 needs less",
            ) from None

    def load(self, layer: int, following: int) -> None:
        """Let what is computed from now on see `layer`, and start to copy `following`, a neighbour of it, if it exists.

        What has been computed so far may use other layers.
        """
        self._copy(layer)
        torch.cuda.current_stream(self._device).wait_event(self._arrived[layer % 2])
        if 0 <= following < len(self._host):
            self._copy(following)

    def load_before_backward(self, layer: int, out: Tensor) -> None:
        """Load `layer`, whose output is `out`, when the backward pass has the gradient of `out`."""
        if out.requires_grad:
            out.register_hook(lambda gradient: self.load(layer, layer - 1))

    def _copy(self, layer: int) -> None:
        slot, start = layer % 2, 0
        if self._present[slot] == layer:
            return
        # not before the layer that is replaced has been computed
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for part in self._host[layer]:
                self._buffers[slot][start : start + len(part)].copy_(part, non_blocking=True)
                start += len(part)
            self._arrived[slot].record(self._stream)
        self._present[slot] = layer

    def _take(self, number: int, layer: nn.Module) -> Sequence[Tensor]:
        """The weights of a layer in one row of pinned bytes, in parts."""
        places = _places(layer)
        packed = torch.empty(sum(_rounded(getattr(*place).nbytes) for place in places), dtype=torch.uint8)
        start = 0
        for module, part in places:
            weight: Tensor = getattr(module, part)
            bytes_of = slice(start, start + weight.nbytes)
            packed[bytes_of].view(weight.dtype).view(weight.shape).copy_(weight)
            _put(module, part, self._buffers[number % 2][bytes_of].view(weight.dtype).view(weight.shape))
            start += _rounded(weight.nbytes)
        return [block.pin_memory() for block in packed.split(_PINNED)]


def _places(layer: nn.Module) -> list[tuple[Frozen, str]]:
    """The streamed weights of a layer: (linear, name of the tensor)."""
    linears = (module for module in layer.modules() if isinstance(module, Frozen))
    return [(linear, part) for linear in linears for part in linear.streamed]


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    is_parameter = name in module._parameters
    setattr(module, name, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def _rounded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNED) * _ALIGNED
