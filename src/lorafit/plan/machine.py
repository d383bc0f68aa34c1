"""The machine that a run computes on: its device, its memory, and the peak while something runs."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from lorafit.distributed.env import ProcessEnv
from lorafit.model.memory import _PROC, available_bytes, resident_bytes
from lorafit.observe.meters import Meter

_SAMPLE_SECONDS = 0.004


@dataclass(frozen=True, slots=True)
class Machine:
    """Where one process of a run computes.

    `available_bytes` is what this process may use in all on `device`, None where unknown. `resident_bytes` is what it
    holds before the network is loaded. `ranks` processes share the work. `host_bytes` is what this process may use of
    the host's memory, where the device has its own.
    """

    device: torch.device
    available_bytes: int | None
    resident_bytes: int
    ranks: int = 1
    host_bytes: int | None = None

    @classmethod
    def read(cls, device: torch.device, env: ProcessEnv) -> Machine:
        """This machine as it is now. The processes of one host share its memory."""
        available, host = (available_bytes(where) for where in (device, torch.device("cpu")))
        host = None if host is None else host // env.local_world_size
        if device.type == "cpu":
            return cls(device, host, resident_bytes(), env.world_size)
        return cls(device, available, resident_bytes(), env.world_size, host)


def process_seconds() -> float:
    """Wall time since this process began; 0 where the system does not tell."""
    try:
        fields = (_PROC / "self" / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        uptime = float((_PROC / "uptime").read_text(encoding="ascii").split()[0])
    except OSError:
        return 0.0
    return max(0.0, uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK"))


@dataclass(slots=True)
class Peak:
    """The peak memory of a block on the device (on the CPU: resident memory)."""

    num_bytes: int = 0


@contextmanager
def watch_peak(device: torch.device) -> Iterator[Peak]:
    """Measure the peak memory of the block.

    The kernel's own count is exact, but does not show a block that stays below an earlier peak. Samples do.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.num_bytes = torch.cuda.max_memory_allocated(device)
        return
    before, done = Meter.memory_bytes(), threading.Event()

    def sample() -> None:
        while not done.is_set():
            peak.num_bytes = max(peak.num_bytes, resident_bytes())
            time.sleep(_SAMPLE_SECONDS)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        done.set()
        sampler.join()
    after = Meter.memory_bytes()
    if after > before or peak.num_bytes == 0:
        peak.num_bytes = after
