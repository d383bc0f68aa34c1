"""Compares `lorafit tune` with the full grid of its points: the held-out loss of its pick, and the time of both.

python benchmarks/tune.py --model MODEL --data ROWS [--steps 64] [section.key=value ...]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from lorafit.config.auto import auto_learning_rate
from lorafit.sweep.halving import points_around, tune
from lorafit.sweep.run import plan_points, run_sweep


def main() -> None:
    """Run both and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--parameters", type=float, help="of the model, for the rates", default=1e9)
    parser.add_argument("settings", nargs="*")
    given = parser.parse_args()
    words = [f"model.name={given.model}", f"data.path={given.data}", f"train.max_steps={given.steps}"]
    words += ["run.check=warn", *given.settings]
    points = points_around(auto_learning_rate(int(given.parameters)))
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        tuned = tune(Path(folder, "tune"), [], words, None, {}, None, print, True)
        took = time.perf_counter() - started
        started = time.perf_counter()
        own = [
            *words,
            "run.samples=0",
            "train.patience=0",
            f"train.eval_every={given.steps}",
            "train.schedule=wsd",
        ]
        planned = []
        for point in points:
            vary = [f"{key}={value}" for key, value in point.items()]
            planned += plan_points(vary, None, 0, own, None, {})
        grid, _ = run_sweep(Path(folder, "grid"), planned, 1, lambda trial, what: None, True)
        whole = time.perf_counter() - started
        names = {tuple(result.trial.point.values()): result.loss for result in grid}
        pick = names[tuple(tuned.results[0].trial.point.values())]
        best = grid[0]
        assert pick is not None
        assert best.loss is not None
        result = {
            "pick": tuned.results[0].trial.point,
            "best": best.trial.point,
            "above_best": pick / best.loss - 1,
        }
        print(json.dumps({**result, "seconds": took, "grid_seconds": whole, "part": took / whole}))


if __name__ == "__main__":
    main()
