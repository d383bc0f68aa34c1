"""visits.bin holds whole steps, whatever happens to the process or the file."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.errors import RunError
from lorafit.observe.visits import VisitLog, read_visits, truncate_visits

STEPS = {1: [4, 0, 7], 2: [1], 5: [], 6: [0, 4_000_000_000]}


def write(path: Path, steps: dict[int, list[int]]) -> None:
    with closing(VisitLog(path)) as log:
        for step, rows in steps.items():
            losses = np.array([[step + row % 10 / 8 for row in rows], [float(step)] * len(rows)])
            log.add(step, np.array(rows, np.int64), losses)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("visits") / "visits.bin"
    write(path, STEPS)
    return path.read_bytes()


def test_what_is_written_is_read(written: bytes, tmp_path: Path) -> None:
    (tmp_path / "visits.bin").write_bytes(written)
    visits = read_visits(tmp_path / "visits.bin")
    assert visits.steps.tolist() == [1, 1, 1, 2, 6, 6]
    assert visits.rows.tolist() == [4, 0, 7, 1, 0, 4_000_000_000]
    assert visits.losses.tolist() == [1.5, 1.0, 1.875, 2.125, 6.0, 6.0]
    assert visits.ends.tolist() == [1, 1, 1, 2, 6, 6]
    assert visits.damaged == 0
    assert len(written) == 16 * len(STEPS) + 8 * len(visits.rows)


@given(data=st.data())
def test_damage_ends_the_record_at_the_step_before(
    written: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "visits.bin"
    at = data.draw(st.integers(0, len(written) - 1))
    flipped = bytes([written[at] ^ 1 << data.draw(st.integers(0, 7))])
    content = data.draw(st.sampled_from([written[:at], written[:at] + flipped + written[at + 1 :]]))
    path.write_bytes(content)
    ends = np.cumsum([16 + 8 * len(rows) for rows in STEPS.values()])
    whole = [step for step, end in zip(STEPS, ends, strict=True) if end <= at]
    visits = read_visits(path)
    assert visits.steps.tolist() == [step for step in whole for _ in STEPS[step]]
    assert visits.damaged == len(content) - sum(16 + 8 * len(STEPS[step]) for step in whole)
    assert truncate_visits(path, 100) == (whole[-1] if whole else 0)
    assert read_visits(path).damaged == 0
    write(path, {200: [3]})
    assert read_visits(path).steps.tolist() == [*visits.steps.tolist(), 200]


@pytest.mark.parametrize("step", range(8))
def test_a_resumed_run_keeps_the_visits_up_to_its_step(written: bytes, tmp_path: Path, step: int) -> None:
    (tmp_path / "visits.bin").write_bytes(written)
    kept = [one for one in STEPS if one <= step]
    assert truncate_visits(tmp_path / "visits.bin", step) == (kept[-1] if kept else 0)
    write(tmp_path / "again.bin", {one: STEPS[one] for one in kept})
    assert (tmp_path / "visits.bin").read_bytes() == (tmp_path / "again.bin").read_bytes()


def test_a_link_is_not_followed(written: bytes, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(written)
    (tmp_path / "visits.bin").symlink_to(tmp_path / "other")
    for act in (read_visits, VisitLog, lambda path: truncate_visits(path, 0)):
        with pytest.raises(RunError):
            act(tmp_path / "visits.bin")
    assert (tmp_path / "other").read_bytes() == written
