"""The memory of this machine and of this process: what is free, what is used, and the peak while something runs."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from lorafit.model.memory import resident_bytes
from lorafit.observe.meters import Meter

if sys.platform == "win32":
    import psutil

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
_NO_LIMIT = 2**60  # version 1 writes a number near 2**63 where there is no limit
_SAMPLE_SECONDS = 0.004
CONTEXT_BYTES = 600 * 10**6  # what CUDA itself takes of a device, which torch does not count


def available_bytes(device: torch.device) -> int | None:
    """Memory that this process may have in all on `device`, what it holds already included; None where unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    if device.type != "cpu":
        return None
    if sys.platform == "win32":
        return int(psutil.virtual_memory().available) + resident_bytes()
    free_host = _field(_PROC / "meminfo", "MemAvailable:")
    if free_host is None:
        return None
    limits = [free_host + resident_bytes(), *_cgroup_limits()]
    return min(limits)


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


def _field(path: Path, name: str) -> int | None:
    """A `name  number kB` line of a file of /proc, in bytes."""
    try:
        for line in path.read_text(encoding="ascii").splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None
