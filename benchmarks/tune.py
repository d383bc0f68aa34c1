"""Compares `lorafit tune` with the full grid of its points: the held-out loss of its pick, and the time of the steps.

python benchmarks/tune.py --model MODEL --data ROWS [--steps 64] [--work FOLDER] [section.key=value ...]

What is in --work already is not computed again: the same command goes on after a stop.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from lorafit.config.auto import auto_learning_rate
from lorafit.observe.metrics_file import read_metrics
from lorafit.sweep.halving import points_around, tune
from lorafit.sweep.run import plan_points, run_sweep


def main() -> None:
    """Run both and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--parameters", type=float, help="of the model, for the rates", default=1e9)
    parser.add_argument("--work", type=Path)
    parser.add_argument("settings", nargs="*")
    given = parser.parse_args()
    words = [f"model.name={given.model}", f"data.path={given.data}", f"train.max_steps={given.steps}"]
    words += ["run.check=warn", *given.settings]
    points = points_around(auto_learning_rate(int(given.parameters)))
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.work or Path(temporary)
        tuned = tune(folder / "tune", [], words, None, {}, None, print, True)
        if tuned.recipe is None:
            raise SystemExit(130)
        own = [*words, "run.samples=0", "train.patience=0", "train.schedule=wsd", "train.refit=false"]
        own += [f"train.eval_every={given.steps}", "run.verify=false", "train.keep_best=false"]
        planned = None
        if not (folder / "grid").exists():
            planned = []
            for point in points:
                vary = [f"{key}={value}" for key, value in point.items()]
                planned += plan_points(vary, None, 0, own, None, {})
        grid, code = run_sweep(folder / "grid", planned, 1, lambda trial, what: None, True)
        if code:
            raise SystemExit(code)
        losses = {tuple(result.trial.point.values()): result.loss for result in grid}
        pick = losses[tuple(tuned.results[0].trial.point.values())]
        best = grid[0]
        assert pick is not None
        assert best.loss is not None
        seconds = sum(
            event["seconds"]
            for result in grid
            for event in read_metrics(result.trial.run.metrics_file)
            if event["event"] == "step"
        )
        result = {
            "pick": tuned.results[0].trial.point,
            "best": best.trial.point,
            "loss_of_pick": pick,
            "loss_of_best": best.loss,
            "above_best": pick / best.loss - 1,
        }
        times = {"seconds": tuned.seconds, "grid_seconds": seconds, "part": tuned.seconds / seconds}
        print(json.dumps({**result, **times}))


if __name__ == "__main__":
    main()
