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
    assert found["steps"] == 18 * 8 + 5 * (32 - hold(8))
    assert found["loss_of_pick"] >= found["loss_of_best"] > 0
    scores = json.loads((tmp_path / "work" / "tune" / "tune.json").read_text())["scores"]
    assert found["loss_of_pick"] == min(score["loss"] for score in scores if score["steps"] == 32)
    assert 0 < found["part"] < 1
    assert found["best"] in [trial.point for trial in trials]
    tune.main()  # from what is on disk
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
