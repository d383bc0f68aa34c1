"""Which device and which number type a run computes in, and what one must not ask of them."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from pathlib import Path

import torch

from lorafit.errors import ConfigError

_MOST_GROWTH = 1.03  # of the process between steps, against its size after the first one
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA, then Apple MPS, then the CPU; a named device must be there. Raises ConfigError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there[device.type]:
        hint = "use model.device=auto, or install a torch build for this device"
        raise ConfigError(f"device `{name}` is not available here", place="model.device", hint=hint)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device `{name}` does not exist: there are {torch.cuda.device_count()} CUDA devices",
            place="model.device",
        )
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies it, float16 on older CUDA chips, else float32."""
    if name != "auto":
        if device.type == "mps" and name == "float64":
            raise ConfigError("MPS has no float64", place="model.dtype", hint="use float32")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu":
        can = torch.cpu.get_capabilities()
        native = ("avx512_bf16", "amx_bf16", "avx10_2", "bf16")  # "bf16" is what Arm reports
        return torch.bfloat16 if any(can.get(name) for name in native) else torch.float32
    return torch.float32


def describe(device: torch.device) -> str:
    """A device for people: its name and memory where it has its own."""
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        return f"{facts.name}, {facts.total_memory / 1e9:.0f} GB"
    if device.type == "cpu":
        name = torch.cpu.get_capabilities().get("cpu_name")
        return f"CPU, {torch.get_num_threads()} threads" + (f", {name}" if name else "")
    return device.type.upper()


def device_memory_bytes(device: torch.device) -> int | None:
    """Peak memory that this process allocated on the device so far; None where the host's is what counts."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def keep_freed_memory() -> None:
    """Let the process reuse the memory of freed tensors instead of giving each back to the system at once.

    A step allocates and frees the same large tensors for every layer, and fresh pages cost as much as the
    arithmetic of a norm. `FreedMemory` is the other half. Does nothing where the C library is not glibc.
    """
    libc = _glibc()
    if libc is not None:
        most = 2**31 - 1
        libc.mallopt(-3, most)  # M_MMAP_THRESHOLD: no allocation gets a mapping of its own
        libc.mallopt(-1, most)  # M_TRIM_THRESHOLD: the top of the heap is kept


class FreedMemory:
    """Gives freed memory back to the system when steps have left so much of it in pieces that the peak grows.

    Packs differ in their number of tokens, so what one step frees does not fit the next one exactly.
    """

    def __init__(self) -> None:
        self._usual = 0

    def tidy(self) -> None:
        """To be called between steps, when their tensors are gone."""
        libc, held = _glibc(), _resident_bytes()
        if libc is None or held <= _MOST_GROWTH * self._usual:
            return
        if self._usual:
            libc.malloc_trim(0)
        else:
            self._usual = held


def _resident_bytes() -> int:
    try:
        with Path("/proc/self/statm").open() as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
