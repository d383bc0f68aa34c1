"""Decode passes that run in one native call: the kernel calls of a pass are recorded once and run again.

Between the kernels of a small network, the operations of Python take longer than the kernels. There is no list of
networks: layers can be repeated where they are nothing but kernel calls (model/native/recording.py), and so can the
head after them. What cannot is computed as always.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lorafit.infer.engine import Decode
from lorafit.model.llama import Llama
from lorafit.model.native import Kernels, kernels
from lorafit.model.native.recording import Recording


class RecordedPass:
    """A decode pass from the stream before the first layer to the logits. Making it computes the pass: `logits`.

    It can `run` for other tokens in the same rows of the same cache as long as the cache has the same capacity and the
    rows the same adapters.
    """

    def __init__(self, network: Llama, x: Tensor, attend: Decode) -> None:
        self._network, self._x, self._positions = network, x, attend.positions
        self._rotary = network.rotary(attend, x.dtype)
        layers = (0, network.arch.num_hidden_layers)
        compiled = kernels() if x.device.type == "cpu" else None
        self._recording, self._stream = _recorded(
            compiled, lambda: network.through_with(self._rotary, x, attend, *layers)
        )
        head, self.logits = _recorded(compiled, lambda: network.logits(self._stream))
        self._has_head = self._recording is not None and head is not None
        if self._recording is not None and head is not None:
            self._recording.extend(head)

    def run(self, x: Tensor, attend: Decode) -> Tensor:
        """The logits for x (rows, hidden_size). The next run overwrites them."""
        if self._recording is None:
            stream = self._network.through(x, attend, 0, self._network.arch.num_hidden_layers)
            return self._network.logits(stream)
        rotary = self._network.rotary(attend, x.dtype)
        self._x.copy_(x)
        self._positions.copy_(attend.positions)
        # layers share tables
        tables = {
            id(old): (old, new)
            for pair in zip(self._rotary, rotary, strict=True)
            for old, new in zip(*pair, strict=True)
        }
        for old, new in tables.values():
            old.copy_(new)
        self._recording.run()
        return self.logits if self._has_head else self._network.logits(self._stream)


def _recorded(compiled: Kernels | None, compute: Callable[[], Tensor]) -> tuple[Recording | None, Tensor]:
    """The kernel calls of `compute`, None if it does more or if there are no kernels, and what it returns."""
    if compiled is None:
        return None, compute()
    with compiled.recording() as record:
        out = compute()
    return (None if record.other else record), out
