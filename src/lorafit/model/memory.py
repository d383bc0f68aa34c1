"""The memory of this process: its size, and how memory that tensors freed is reused or released."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path
from typing import ClassVar

import psutil
import torch

from lorafit.model.native import blocks

MUCH_FREE = 192 * 10**6
# Blocks that are kept beyond the largest size in use together, for sizes that alternate
SPARE_BYTES = 64 * 2**20
MOST_KERNELS = 64  # compiled products that torch's CPU library keeps


def use_caching_allocator() -> None:
    """Reuse the memory of freed tensors instead of releasing each to the system at once.

    A step allocates and frees the same large tensors for every layer, and new pages cost as much as the arithmetic of
    a norm. Torch takes large tensors from blocks that are kept (model/native/blocks.cpp). If these cannot be compiled,
    glibc keeps freed memory, and `release_free_memory` bounds it.
    """
    _is_caching[:] = [True]
    held = blocks()
    if held is not None:
        held.keep_blocks(ctypes.c_size_t(SPARE_BYTES))
        return
    libc = _glibc()
    if libc is not None:
        most = 2**31 - 1
        libc.mallopt(-3, most)  # M_MMAP_THRESHOLD: no allocation gets a mapping of its own
        libc.mallopt(-1, most)  # M_TRIM_THRESHOLD: the top of the heap is kept


def limit_onednn_cache() -> None:
    """Bound the number of compiled products that torch's CPU libraries (oneDNN and ideep) keep.

    By default each keeps 1,024, of more than a megabyte each; packs seldom have the same size twice. Call it before
    the first 16-bit product of the process. A capacity that the user has set stays.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(MOST_KERNELS))


def resident_bytes() -> int:
    """Memory of this process that is resident now."""
    return int(psutil.Process().memory_info().rss)


def release_free_memory(least: int = 0) -> None:
    """Release freed memory to the system, if it is at least `least` bytes; nothing without `use_caching_allocator`.

    In glibc's heap the tensors that a layer saves lie between freed ones: the memory that one pass frees does not fit
    the next, and the peak grows. Call it between layers and passes, when their tensors are freed. Blocks have a bound
    of their own: they are released only if `least` is 0.
    """
    if not _is_caching[0]:
        return
    held = blocks()
    if held is not None:
        if least:
            return
        held.release_blocks()
    libc = _glibc()
    if libc is not None and (least == 0 or _free_bytes(libc) >= least):
        libc.malloc_trim(0)
        _released[:] = [_own_bytes() - _used_bytes(libc)]


_is_caching = [False]
_released = [0]  # unused bytes of the process's own memory after the last release


def _free_bytes(libc: ctypes.CDLL) -> int:
    """Bytes freed since the last release and still resident. The library's own count includes released memory."""
    return _own_bytes() - _used_bytes(libc) - _released[0]


def _used_bytes(libc: ctypes.CDLL) -> int:
    """Allocated bytes; 0 if the C library is too old to count them: then memory is released more often."""
    if not hasattr(libc, "mallinfo2"):
        return 0
    libc.mallinfo2.restype = _Mallinfo
    info = libc.mallinfo2()
    return int(info.uordblks + info.hblkhd)


def _own_bytes() -> int:
    """Resident memory of this process that no file stands behind."""
    used = psutil.Process().memory_info()
    return int(used.rss - used.shared)


class _Mallinfo(ctypes.Structure):
    """`struct mallinfo2` of <malloc.h>."""

    _fields_: ClassVar = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    ]


_OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a device or of the host. Torch reports some of these in the message only: the host's,
    and on CUDA what is not allocated as a tensor (a handle's workspace, a loaded kernel).
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _OUT_OF_MEMORY)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
_NO_LIMIT = 2**60  # version 1 writes a number near 2**63 where there is no limit


def available_bytes(device: torch.device) -> int | None:
    """Memory available to this process on `device`, including what it has allocated; None if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    if device.type != "cpu":
        return None
    return min([int(psutil.virtual_memory().available) + resident_bytes(), *_cgroup_limits()])


def _cgroup_limits() -> list[int]:
    """The memory limits of this process's control groups (version 2 or 1) and of the groups above them."""
    try:
        lines = (_PROC / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = _CGROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = _CGROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        folder = root / path.lstrip("/")
        for group in [folder, *folder.parents]:
            try:
                text = (group / name).read_text(encoding="ascii").strip()
            except OSError:
                text = "max"
            if text.isdigit() and int(text) < _NO_LIMIT:
                limits.append(int(text))
            if group == root:
                break
    return limits
