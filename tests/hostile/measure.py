"""The peak of this process's memory during a block."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """Megabytes above what was in use before; set when the block ends."""

    megabytes = 0


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Where Linux does not allow to reset the peak, only what goes beyond the peak so far is seen."""
    peak = Peak()
    before = _kilobytes("VmRSS") if _reset() else _highest()
    try:
        yield peak
    finally:
        peak.megabytes = max(0, _highest() - before) // 1024


def _reset() -> bool:
    with suppress(OSError):
        _RESET.write_text("5")
        return True
    return False


def _highest() -> int:
    if _STATUS.exists():
        return _kilobytes("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _kilobytes(name: str) -> int:
    return int(_STATUS.read_text().partition(f"{name}:")[2].split()[0])
