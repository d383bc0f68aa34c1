"""Curves of short runs are exact; those of long ones are bounded and keep their ends, extremes and means."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.observe.metrics_file import STEP, event_of, series
from lorafit.observe.run_summary import Overview
from lorafit.report import curves
from lorafit.report.curves import MOST, Curve, StepCurves

VALUES = st.one_of(
    *(st.floats(), st.integers(), st.none(), st.booleans(), st.text(max_size=3)),
    *(st.just(10**400), st.just(1e100), st.lists(st.integers(), max_size=2)),
)
EVENTS = st.dictionaries(st.sampled_from(["step", *curves.NAMES, "other"]), VALUES)


def line_of(event: dict[str, object]) -> bytes:
    line = (json.dumps({"event": "step", "step": 0} | event) + "\n").encode()
    assert line.startswith(STEP)
    return line


@given(st.lists(EVENTS, max_size=20), st.lists(st.sampled_from([b"{\n", b"\xff\n", b'{"event": "step", \n'])))
def test_all_at_once_is_read_as_one_by_one(events: list[dict[str, object]], damaged: list[bytes]) -> None:
    lines = [*map(line_of, events), *damaged]
    read = []
    for few in (0, 10**9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(curves, "_FEW", few)
            steps = StepCurves()
            for line in lines:
                steps.add(line)
            steps.flush()
        read.append(({name: curve.points() for name, curve in steps.curves.items()}, steps.num_damaged))
    assert read[0] == read[1]
    assert read[0][1] == len(damaged)
    known = [event for event in map(event_of, lines) if event is not None]
    for name in curves.NAMES[:4]:
        assert read[0][0][name] == series(known, name)


@pytest.mark.parametrize("num_points", [1, MOST - 1, MOST, MOST + 1, 5 * MOST + 3])
@pytest.mark.parametrize("block", [997, 10**6])
def test_a_long_curve_keeps_ends_extremes_and_means(num_points: int, block: int) -> None:
    random = np.random.default_rng(num_points)
    steps, values = np.arange(num_points, dtype=float), random.random(num_points)
    curve = Curve()
    for start in range(0, num_points, block):
        curve.add(steps[start : start + block], values[start : start + block])
    points, means = curve.points(), curve.means()
    pairs = list(zip(steps.tolist(), values.tolist(), strict=True))
    assert len(points) <= 2 * MOST + 2 >= len(means)
    assert set(points) <= set(pairs)
    assert [x for x, _ in points] == sorted({x for x, _ in points})
    assert (points[0], points[-1]) == (pairs[0], pairs[-1])
    assert {min(values), max(values)} <= {y for _, y in points}
    assert statistics.fmean(y for _, y in means) == pytest.approx(values.mean(), rel=0.02)
    if num_points < MOST:
        assert points == means == pairs


@given(st.lists(st.sampled_from(["step", "bad step", "heldout", "run_started", "run_ended", "note", "bad"])))
def test_an_overview_is_the_same_with_every_line_parsed(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[str]
) -> None:
    path: Path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    lines = []
    for number, kind in enumerate(kinds):
        if kind.startswith("bad"):
            lines.append('{"event": "step", "step": oh}' if kind == "bad step" else "{")
        else:
            lines.append(json.dumps({"event": kind, "step": number, "loss": number % 3, "num_steps": 9}))
    path.write_text("".join(f"{line}\n" for line in lines))
    quick, whole = Overview.read(path), Overview._of_all(path)
    assert (quick.newest, quick.last, quick.best) == (whole.newest, whole.last, whole.best)
    assert quick.has_events == whole.has_events
