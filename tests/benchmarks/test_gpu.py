"""The acceptance on a GPU: what it prints and writes, and that it runs on the simulated device."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from benchmarks.gpu_model import CHIPS, Chip, group, record_seconds
from benchmarks.gpu_results import Results, Speed

ROOT = Path(__file__).parents[2]


def test_results_are_counted_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise RuntimeError("no kernel image")

    results = Results(end=time.monotonic() + 100)
    results.run("one", lambda: results.at_most("error", 0.5, 1.0))
    results.run("two", lambda: results.at_most("error", float("nan"), 1.0))
    results.run("three", fails)
    results.run("late", fails, reserve=200)
    results.speed(Speed("a run", 90_000.0, 12.5, goal=100_000.0))
    lines = results.text().splitlines()
    assert lines[2].split("|")[2:5] == ["        100,000 ", "   90,000 ", " missed "]
    assert lines[3:] == [
        "failed: two: error: nan",
        "failed: three: runs to its end: RuntimeError: no kernel image",
        "not run: late: late: no time left",
        "1 passed, 2 failed, 1 not run",
    ]
    record = json.loads(results.as_json({"device": "none"}))
    assert [check["verdict"] for check in record["checks"]] == ["passed", "failed", "failed", "not run"]
    assert record["machine"] == {"device": "none"}
    assert "passed  error  0.5 (at most 1)" in capsys.readouterr().out


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_no_operation_is_predicted_faster_than_the_chip(chip: Chip) -> None:
    for rows, columns, depth in ((2048, 2048, 2048), (16384, 5632, 2048), (17, 16, 2048), (16, 2048, 16384)):
        flops, num_bytes = 2 * rows * columns * depth, 2 * (rows * depth + depth * columns + rows * columns)
        shapes = ((rows, depth), (depth, columns))
        product = SimpleNamespace(
            name="mm", launches=1, flops=flops, num_bytes=num_bytes, shapes=shapes, wait=""
        )
        seconds = record_seconds(chip, product)
        assert seconds > max(flops / chip.peak, num_bytes / chip.bandwidth, chip.floor / 3)
        assert group(product) == ("frozen products" if min(rows, columns) > 64 else "low-rank products")
        product.name = "copy_"
        assert record_seconds(chip, product) >= max(num_bytes / chip.bandwidth, chip.floor)


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")),
    reason="needs Linux and a C++ compiler",
)
def test_it_runs_on_the_simulated_device(tmp_path: Path) -> None:
    only = ("--only", "loss", "dropout", "waits", "operations")
    command = [sys.executable, "-m", "benchmarks.gpu", "--simulate", "--short", *only]
    given = [*command, "--json", str(tmp_path / "gpu.json")]
    done = subprocess.run(given, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 passed, 0 failed, 1 not run" in done.stdout
    assert json.loads((tmp_path / "gpu.json").read_text())["machine"]["device"] == "simulated"
