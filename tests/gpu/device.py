"""What the fake and the simulated device have in common: torch.cuda as a program sees it."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from tests.gpu import guard
from tests.gpu.streams import PATCHES, pinned, streams

T4, A100, H100 = (7, 5), (8, 0), (9, 0)
NAMES = {T4: "Tesla T4", A100: "NVIDIA A100", H100: "NVIDIA H100"}
GIGABYTES = {T4: 16, A100: 80, H100: 80}


class Memory:
    """The bytes of a device: `now` and `peak` are allocated. Beyond `limit`, an allocation raises."""

    def __init__(self, total: int) -> None:
        self.total, self.now, self.peak = total, 0, 0
        self.limit: float = total

    def allocate(self, num_bytes: int) -> None:
        if self.now + num_bytes > self.limit:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {num_bytes} bytes")
        self.now += num_bytes
        self.peak = max(self.peak, self.now)

    def free(self, num_bytes: int) -> None:
        self.now -= num_bytes

    @contextmanager
    def short(self) -> Iterator[None]:
        """Inside the block no allocation succeeds."""
        before, self.limit = self.limit, -1
        try:
            yield
        finally:
            self.limit = before


@contextmanager
def present(capability: tuple[int, int], memory: Memory) -> Iterator[None]:
    """Programs in the block see one CUDA device of this capability; nothing computes on it."""
    properties = types.SimpleNamespace(
        name=NAMES[capability],
        major=capability[0],
        minor=capability[1],
        total_memory=memory.total,
        multi_processor_count=132,
    )
    state = torch.zeros(16, dtype=torch.uint8)

    def reset_peak(device: object = None) -> None:
        memory.peak = memory.now

    def limit_to(share: float, device: object = None) -> None:
        memory.limit = share * memory.total

    patches = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: properties.name,
        "mem_get_info": lambda device=None: (memory.total - memory.now, memory.total),
        "memory_reserved": lambda device=None: memory.now,
        "memory_allocated": lambda device=None: memory.now,
        "max_memory_allocated": lambda device=None: memory.peak,
        "set_per_process_memory_fraction": limit_to,
        "reset_peak_memory_stats": reset_peak,
        "get_rng_state": lambda device="cuda": state.clone(),
        "get_rng_state_all": lambda: [state.clone()],
        "set_rng_state": lambda new, device="cuda": None,
        "manual_seed_all": lambda seed: None,
        "_lazy_init": lambda: None,
        **PATCHES,
    }
    streams.reset()
    with ExitStack() as stack:
        for name, patch in patches.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, patch))
        stack.enter_context(mock.patch.object(torch.version, "cuda", torch.version.cuda or "13.0"))
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", pinned))
        # bitsandbytes keeps its tables: those of an earlier device are not of this one
        for module, name in (("backends.utils", "_code_4bit_cache"), ("functional", "name2qmap")):
            kept = getattr(sys.modules.get(f"bitsandbytes.{module}"), name, {})
            stack.enter_context(mock.patch.dict(kept, clear=True))
        guard.install()
        # torch.tensor(..., device="cuda") is made on the CPU and moved
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        yield
