"""The process's own memory: what it holds, and how it keeps, reuses and gives back what tensors freed."""

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
# Blocks that are kept beyond what was once in use together, for sizes that come in turns
SPARE_BYTES = 64 * 2**20
MOST_KERNELS = 64  # compiled products that torch's CPU library keeps


def use_caching_allocator() -> None:
    """Let the process reuse the memory of freed tensors instead of giving each back to the system at once.

    A step allocates and frees the same large tensors for every layer, and fresh pages cost as much as the
    arithmetic of a norm. Torch takes large tensors from blocks that are kept (model/native/blocks.cpp); where these
    cannot be compiled the C library keeps what is freed, if it is glibc, and `release_free_memory` bounds it.
    """
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
    """Bound what torch's CPU libraries (oneDNN and ideep above it) keep of the products that they compile.

    By default each keeps 1,024, of more than a megabyte; packs seldom have the same size twice. To be called
    before the first 16-bit product of the process; a capacity that the user has set stays.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(MOST_KERNELS))


def resident_bytes() -> int:
    """Memory of this process that is resident now."""
    return int(psutil.Process().memory_info().rss)


def release_free_memory(least: int = 0) -> None:
    """Give memory that was freed back to the system, where so many bytes of it take room.

    In glibc's heap what a layer keeps lies between what it freed: what one pass frees does not quite fit the next, and
    the peak grows. To be called between layers and passes, when their tensors are gone. Blocks bound themselves: they
    are given back only when all is.
    """
    held = blocks()
    if held is not None:
        if least:
            return
        held.release_blocks()
    libc = _glibc()
    if libc is not None and (least == 0 or _free_bytes(libc) >= least):
        libc.malloc_trim(0)
        _given_back[:] = [_own_bytes() - _used_bytes(libc)]


_given_back = [0]  # of the process's own memory what was not in use when it last gave all back


def _free_bytes(libc: ctypes.CDLL) -> int:
    """What was freed since memory was last given back and still takes room. The library's own count has no end: it
    goes on counting what it has given back."""
    return _own_bytes() - _used_bytes(libc) - _given_back[0]


def _used_bytes(libc: ctypes.CDLL) -> int:
    """What is allocated; 0 where the C library is too old to say, and then it is given back more often."""
    if not hasattr(libc, "mallinfo2"):
        return 0
    libc.mallinfo2.restype = _Mallinfo
    said = libc.mallinfo2()
    return int(said.uordblks + said.hblkhd)


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, of a device or of the host (torch says that in words)."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


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
    """Memory that this process may have in all on `device`, what it holds already included; None where unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    if device.type != "cpu":
        return None
    return min([int(psutil.virtual_memory().available) + resident_bytes(), *_cgroup_limits()])


def _cgroup_limits() -> list[int]:
    """The limits of the control groups that this process is in, of version 2 or 1; an outer one binds too."""
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
        for place in [folder, *folder.parents]:
            try:
                text = (place / name).read_text(encoding="ascii").strip()
            except OSError:
                text = "max"
            if text.isdigit() and int(text) < _NO_LIMIT:
                limits.append(int(text))
            if place == root:
                break
    return limits
