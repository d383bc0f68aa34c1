"""Speed and remaining time come from recent steps; memory is a peak."""

from __future__ import annotations

import psutil

from lorafit.observe.meters import Meter


def test_speed_is_tokens_over_seconds_of_the_window() -> None:
    meter = Meter(window=2)
    assert meter.update(1000, 1.0) == 1000
    assert meter.update(100, 1.0) == 550
    assert meter.update(500, 2.0) == 200


def test_eta_ignores_a_slow_first_step() -> None:
    meter = Meter()
    for seconds in (60.0, 2.0, 2.0):
        meter.update(100, seconds)
    assert meter.eta(10) == 20
    assert meter.eta(0) == 0


def test_steps_too_short_to_time() -> None:
    assert Meter().update(100, 0.0) == 0


def test_memory_is_a_peak() -> None:
    present = psutil.Process().memory_info().rss
    assert 0.9 * present < Meter.memory_bytes() < psutil.virtual_memory().total
