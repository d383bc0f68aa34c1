"""Durations, counts and sizes of memory as short text."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """`42s`, `1m 12s`, `3h 05m` or `2d 04h`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}h"
    if hours:
        return f"{hours}h {minute:02d}m"
    return f"{minutes}m {second:02d}s" if minutes else f"{second}s"


def count(number: float, name: str) -> str:
    """`1 step`, `2 steps`, `1,200 steps`, `1.5 epochs`."""
    digits = f"{number:,.0f}" if number % 1 == 0 else f"{number:,g}"
    return f"{digits} {name}{'' if number == 1 else 's'}"


def short_count(number: float) -> str:
    """`950`, `4.5K`, `1.1B`."""
    for unit in ("", "K", "M"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}B"


def memory_size(num_bytes: float) -> str:
    """`850 MB`, `1.2 GB`: in decimal units, as GPU tools show memory."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
