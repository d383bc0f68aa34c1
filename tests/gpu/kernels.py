"""Triton's kernels where there is no GPU: counted on the fake device, or computed by tests/gpu/interpreted.py."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch import Tensor

from lorafit.model import gpu_ops
from lorafit.model.fused_layer import fuse_layers
from lorafit.model.llama import Llama


@contextmanager
def counted(gpu: Any) -> Iterator[None]:
    """On the fake device: each kernel is one launch, which reads or writes each of its tensors once."""

    def launch(name: str, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        flat = [x for arg in arguments for x in (arg if isinstance(arg, tuple) else (arg,))]
        tensors = [x for x in flat if isinstance(x, Tensor)]
        assert all(x.is_cuda for x in tensors)
        num_bytes = sum(x.numel() * x.element_size() for x in tensors)
        gpu.add(f"triton {name}", 1, num_bytes, shapes=tuple(tuple(x.shape) for x in tensors))

    with enabled(launch):
        yield


@contextmanager
def installed(gpu: Any) -> Iterator[None]:
    """The same for whole runs, which look for the package triton and decide themselves."""
    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return "there" if name == "triton" else real(name, package)

    with counted(gpu), mock.patch.object(importlib.util, "find_spec", find_spec):
        yield


@contextmanager
def enabled(launch: Any, failing: Collection[str] = ()) -> Iterator[None]:
    """`launch` in the place of model/gpu_ops.py's, as if Triton were there. The kernels `failing` do not compile; the
    block must start each of them, and no other may raise.
    """
    raised: dict[str, Exception] = {}

    def watched(name: str, *arguments: Any, **constants: Any) -> None:
        try:
            if name in failing:
                raise RuntimeError("PassManager::run failed\nin ttgir")
            launch(name, *arguments, **constants)
        except Exception as error:
            assert name not in raised, f"{name} is started again, although it raised {error}"
            raised[name] = error
            raise

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(gpu_ops, "launch", watched))
        stack.enter_context(mock.patch.object(gpu_ops, "_failed", {}))
        stack.enter_context(mock.patch.dict(gpu_ops._state, {"enabled": True}))
        yield
    assert set(raised) == set(failing), raised


def fused(network: Llama) -> Llama:
    """The network with all its layers merged."""
    assert fuse_layers(network) == len(network.decoder.layers)
    return network
