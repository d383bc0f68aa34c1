"""The simulated CUDA device with Triton's kernels, which Triton's interpreter computes on the processor.

A pytest plugin: the interpreter is chosen when the kernels are imported, the device before lorafit is.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from tests.gpu.kernels import enabled
from tests.gpu.simulated import Simulated, simulated_cuda

from lorafit.model import gpu_ops

LAUNCH = gpu_ops.launch


def _inner(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(map(_inner, x))
    return x.inner if isinstance(x, Simulated) else x


@contextmanager
def kernels_interpreted(failing: Collection[str] = ()) -> Iterator[list[str]]:
    """The kernels on a simulated device while the block runs. Gives the names of those that ran."""
    names: list[str] = []

    def launch(name: str, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        names.append(name)
        LAUNCH(name, grid, *map(_inner, arguments), **constants)

    with enabled(launch, failing):
        yield names


@contextmanager
def interpreted(capability: tuple[int, int], failing: Collection[str] = ()) -> Iterator[list[str]]:
    """The device and its kernels while the block runs. Gives the names of the kernels that ran: not those that do not
    compile.
    """
    with simulated_cuda(capability), kernels_interpreted(failing) as names:
        yield names
