"""The arithmetic of benchmarks/neighbours.py and its busy programs; never speed itself."""

from __future__ import annotations

import os
import sys

import pytest
from benchmarks.neighbours import Part, busy_programs, fair_share, report

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_a_fair_share_is_half_of_each_core_that_is_wanted_twice() -> None:
    assert [fair_share(busy, 2) for busy in (0, 1, 2)] == [1, 0.75, 0.5]
    assert fair_share(1, 8) == 15 / 16
    assert fair_share(4, 2) == pytest.approx(1 / 3)


def test_parts_of_one_load_are_one_row() -> None:
    parts = [
        Part("train", busy, tokens, 10.0, 15.0, busy * 5.0, 10.0)
        for busy, tokens in ((0, 1100), (1, 300), (1, 375), (0, 900))
    ]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report(parts, 2).splitlines()[2:]]
    assert rows == [
        ["train", "0", "100.0", "1.00", "1.00", "1.50", "0.00"],
        ["train", "1", "33.8", "0.34", "0.45", "1.50", "0.50"],
    ]


def test_busy_programs_end_with_their_part_also_after_an_error() -> None:
    core = min(os.sched_getaffinity(0))
    with pytest.raises(KeyboardInterrupt), busy_programs(2, [core]) as loops:
        assert len(loops) == 2
        assert all(os.sched_getaffinity(pid) == {core} for pid in loops)
        raise KeyboardInterrupt
    for pid in loops:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
