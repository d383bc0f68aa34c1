"""The rows, marks and times of benchmarks/time_to_quality.py, and its quick form."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.time_to_quality import BEST, DEFAULTS, Run, marks, report, seconds_to, split
from tests.shared_files import shared_dir

ROOT = Path(__file__).resolve().parents[2]


def test_held_out_rows_are_no_training_rows_and_the_same_each_time() -> None:
    rows = [{"prompt": str(number), "completion": "x"} for number in range(100)]
    training, heldout = split(rows, None)
    assert (training, heldout) == split(rows, None)
    assert len(heldout) == 10
    assert sorted([*training, *heldout], key=str) == sorted(rows, key=str)
    assert [len(part) for part in split(rows, 20)] == [18, 2]


def test_a_mark_is_the_last_loss_and_its_time_the_first_loss_as_low() -> None:
    runs = [
        Run(DEFAULTS, "demo", seed, [(100.0, last), (50.0, 3.0)]) for seed, last in enumerate((2.0, 2.4, 2.2))
    ]
    runs += [Run("TRL rate 0.001 all", "demo", 0, [(60.0, 1.5), (30.0, 2.1)])]
    runs += [Run("lorafit", "demo", 0, [(5.0, 2.5), (10.0, 2.2), (20.0, 1.6), (15.0, 1.9)])]
    assert marks(runs) == {DEFAULTS: (2.2, 100.0), BEST: (1.5, 60.0)}
    assert seconds_to(2.2, runs[-1].losses) == 10.0
    assert seconds_to(1.5, runs[-1].losses) == math.inf
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report(runs).splitlines()[2:]]
    assert ["demo", "TRL: 2.200 in 100 s", "lorafit", "10", "10.0x", "5x"] in rows
    assert ["demo", "TRL, best: 1.500 in 60 s", "lorafit", "not reached", "-", "3x"] in rows
    assert ["demo", "TRL, best: 1.500 in 60 s", "TRL rate 0.001 all", "60", "1.0x", "-"] in rows


@pytest.mark.slow
def test_the_quick_form_judges_each_saved_adapter_and_goes_on_from_its_results(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    shared_dir()
    command = [sys.executable, "-m", "benchmarks.time_to_quality", "--quick", "--work", str(tmp_path)]
    done = subprocess.run(
        [*command, "--only", "lorafit"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    kept = json.loads((tmp_path / "results/tasks-lorafit-0.json").read_text())
    assert len(kept["losses"]) >= 2
    assert kept["losses"] == sorted(kept["losses"])
    assert kept["losses"][-1][1] < kept["losses"][0][1]
