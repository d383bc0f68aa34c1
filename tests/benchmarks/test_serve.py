"""The load test counts what a server answers, and its figures are those of the answers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from benchmarks.serve import Measured, Reply, measure, percentile, table
from tests.serve.live import TOKEN, live, write_and_load


def test_it_measures_a_live_server(tmp_path: Path) -> None:
    with live(write_and_load(tmp_path), slots=4, queue=16) as there:
        url = f"{there.url}/v1"
        found = asyncio.run(measure(url, TOKEN, "one", 3, 7, 5))
        with pytest.raises(RuntimeError, match="no whole answer"):
            asyncio.run(measure(url, "wrong", "one", 1, 1, 5))
    assert found.clients == 3
    assert len(found.replies) == 7
    assert all(0 < reply.first <= reply.last and 0 < reply.tokens <= 5 for reply in found.replies)


def test_the_table_has_rates_and_percentiles() -> None:
    one = Measured(1, [Reply(0.1, 1.0, 10)] * 99 + [Reply(0.2, 9.0, 10)], 100.0)
    many = Measured(16, [Reply(0.1, 1.0, 10)] * 100, 20.0)
    first, second = table([one, many]).splitlines()[2:]
    assert first == "| 1 | 10 | 1.0 | 100 ms | 100 ms | 1,000 ms | 1,000 ms | 1,000 ms |"
    assert second.startswith("| 16 | 50 | 5.0 |")
    assert [percentile([3, 1, 2, 4], share) for share in (0.01, 0.5, 0.75, 1.0)] == [1, 2, 3, 4]
