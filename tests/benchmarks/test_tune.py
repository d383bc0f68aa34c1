"""The comparison of a search with its full grid runs to its end, and what it says is what the runs have."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tests.runs import tiny_settings

from benchmarks import tune
from lorafit.sweep.halving import hold
from lorafit.sweep.run import open_sweep


@pytest.mark.slow
def test_a_search_is_compared_with_the_grid_of_its_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ("model.name", "data.path")
    model, data, *settings = (
        word.partition("=")[2] if word.startswith(own) else word for word in tiny_settings(tmp_path)
    )
    words = ["tune", "--model", model, "--data", data, "--steps", "32", "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", [*words, *settings, "data.holdout=8"])
    tune.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    trials = open_sweep(tmp_path / "work" / "grid")
    assert len(trials) == 18
    assert found["grid_steps"] == 18 * 32
    scores = json.loads((tmp_path / "work" / "tune" / "tune.json").read_text())["scores"]
    # 8, 16 and 32 steps; the search may end before its last rung, where longer runs are worse
    of_rung = {8: 18 * 8, 16: 9 * (16 - hold(8)), 32: 4 * (32 - hold(16))}
    assert found["steps"] == sum(of_rung[length] for length in {score["steps"] for score in scores})
    pick = min(scores, key=lambda score: score["loss"])
    assert (found["loss_of_pick"], found["length_of_pick"]) == (pick["loss"], pick["steps"])
    assert found["loss_of_best"] > 0
    assert found["above_best"] == pick["loss"] / found["loss_of_best"] - 1
    assert 0 < found["part"] < 1
    assert found["best"] in [trial.point for trial in trials]
    tune.main()  # from what is on disk
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
