"""Decode passes whose layers run in one native call: the kernel calls of a pass are recorded once and run again.

Between the kernels of a small network, the operations of Python take longer than the kernels. There is no list of
networks: a pass can be repeated where its layers are nothing but kernel calls (model/native/recording.py). Other passes
are computed as always.
"""

from __future__ import annotations

from torch import Tensor

from lorafit.infer.engine import Decode
from lorafit.model.llama import Llama
from lorafit.model.native import kernels
from lorafit.model.native.recording import Recording


class RecordedPass:
    """The layers of a decode pass. Making it computes the pass: `out` is the stream after the last layer.

    It can `run` for other tokens in the same rows of the same cache as long as the cache has the same capacity and the
    rows the same adapters.
    """

    def __init__(self, network: Llama, x: Tensor, attend: Decode) -> None:
        self._network, self._x, self._positions = network, x, attend.positions
        self._rotary = network.rotary(attend, x.dtype)
        self._recording: Recording | None = None
        layers = (0, network.arch.num_hidden_layers)
        compiled = kernels() if x.device.type == "cpu" else None
        if compiled is None:
            self.out = network.through_with(self._rotary, x, attend, *layers)
            return
        with compiled.recording() as record:
            self.out = network.through_with(self._rotary, x, attend, *layers)
        self._recording = None if record.other else record

    def run(self, x: Tensor, attend: Decode) -> Tensor:
        """The stream after the last layer for x (rows, hidden_size). The next run overwrites it."""
        if self._recording is None:
            return self._network.through(x, attend, 0, self._network.arch.num_hidden_layers)
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
        return self.out
