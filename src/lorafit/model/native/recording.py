"""Records the kernel calls of a pass, so that the same pass runs again in one native call.

A recording holds addresses: the tensors of the pass are its buffers, and the caller writes new inputs into them. It is
complete only if nothing but kernels computed: an operation of torch in between makes it unusable.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Argument = Tensor | int | float | None

_active: ContextVar[Recording | None] = ContextVar("recording", default=None)


class Recording:
    """Kernel calls in their order. `other` names an operation of torch that computed something; "" if none did."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.other = ""
        self._library = library
        self._kernels: list[int] = []
        self._words: list[ctypes.Array[ctypes.c_int64]] = []
        self._tensors: list[Tensor] = []  # their memory must stay
        self._call: tuple[Any, ...] = ()

    def add(self, kernel: str, arguments: Sequence[Argument]) -> None:
        """Record a call of the function `kernel`; its last parameter, the number of threads, is that of each run."""
        function = getattr(self._library, f"{kernel}_words")
        self._kernels.append(ctypes.cast(function, ctypes.c_void_p).value or 0)
        self._words.append((ctypes.c_int64 * len(arguments))(*map(_word, arguments)))
        self._tensors += [argument for argument in arguments if isinstance(argument, Tensor)]

    def extend(self, other: Recording) -> None:
        """Add the calls of `other`, which follow."""
        self._kernels += other._kernels
        self._words += other._words
        self._tensors += other._tensors

    def run(self) -> None:
        """Run all calls again, on all of torch's threads."""
        if not self._call:
            count = len(self._kernels)
            words = (ctypes.c_void_p * count)(*map(ctypes.addressof, self._words))
            self._call = ctypes.c_int64(count), (ctypes.c_void_p * count)(*self._kernels), words
        self._library.run_recorded(*self._call, ctypes.c_int(torch.get_num_threads()))


def active() -> Recording | None:
    """The recording of this thread, if one is being made."""
    return _active.get()


@contextmanager
def recording(library: ctypes.CDLL) -> Iterator[Recording]:
    """Record the kernel calls of the block."""
    record = Recording(library)
    token = _active.set(record)
    try:
        with _Operations(record):
            yield record
    finally:
        _active.reset(token)


class _Operations(TorchDispatchMode):
    """Sees the operations of torch: only views and new memory compute nothing."""

    def __init__(self, record: Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._record = record

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # else torch loads its compiler
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket not in _NEW_MEMORY and not _is_view(func, out, args, kwargs):
            self._record.other = str(func)
        return out


def _is_view(func: Any, out: Any, *inputs: Any) -> bool:
    """Whether `out` is memory of the inputs: `contiguous` and others give a view or a copy."""
    memory = _storages(out)
    return bool(memory) and memory <= _storages(inputs) and not func._schema.is_mutable


def _storages(tensors: Any) -> set[int]:
    leaves = (tensors,) if isinstance(tensors, Tensor) else tree_leaves(tensors)
    return {leaf.untyped_storage().data_ptr() for leaf in leaves if isinstance(leaf, Tensor)}


_NEW_MEMORY = (torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty)


def _word(argument: Argument) -> int:
    match argument:
        case Tensor():
            return argument.data_ptr()
        case None:
            return 0
        case float():
            return int.from_bytes(struct.pack("=f", argument), "little")
        case _:
            return argument
