"""The memory of this machine and of this process: what is free, what is used, and the peak while something runs."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from lorafit.model.memory import _PROC, resident_bytes
from lorafit.observe.meters import Meter

if sys.platform == "win32":
    pass

_SAMPLE_SECONDS = 0.004
CONTEXT_BYTES = 600 * 10**6  # what CUDA itself takes of a device, which torch does not count


def process_seconds() -> float:
    """Wall time since this process began; 0 where that cannot be asked."""
    try:
        fields = (_PROC / "self" / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        uptime = float((_PROC / "uptime").read_text(encoding="ascii").split()[0])
    except OSError:
        return 0.0
    return max(0.0, uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK"))


@dataclass(slots=True)
class Peak:
    """The most memory that was in use on the device (for the CPU: resident) while the block ran."""

    num_bytes: int = 0


@contextmanager
def watch_peak(device: torch.device) -> Iterator[Peak]:
    """Measure the peak of what the block does.

    The kernel's own count is exact, but tells nothing of a block that stays below an earlier peak: samples do.
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
