"""Compares `lorafit tune` with the full grid of its points: the held-out loss of its pick, and the time of the steps.

A run of the grid counts with the lowest of 16 measurements. The seconds of a step are the median of its point in the
grid, so that a program beside a part of the runs counts less.

python benchmarks/tune.py --model MODEL --data ROWS [--steps 64] [--work FOLDER] [section.key=value ...]

What is in --work already is not computed again: the same command goes on after a stop.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorafit.observe.metrics_file import read_metrics
from lorafit.sweep.halving import Tuned, hold, lengths, tune, warmup
from lorafit.sweep.run import TrialResult, plan_points, run_sweep


def main() -> None:
    """Run both and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--work", type=Path)
    parser.add_argument("settings", nargs="*")
    given = parser.parse_args()
    words = [f"model.name={given.model}", f"data.path={given.data}", f"train.max_steps={given.steps}"]
    words += ["run.check=warn", *given.settings]
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.work or Path(temporary)
        tuned = tune(folder / "tune", [], words, None, {}, None, print, True)
        if tuned.recipe is None:
            raise SystemExit(130)
        own = [*words, "run.samples=0", "train.patience=0", "train.schedule=wsd", "train.refit=false"]
        own += [f"train.eval_every={max(1, given.steps // 16)}", "run.verify=false", "train.keep_best=false"]
        # as in the search, so that a run of the whole length has the same loss in both
        own += [f"train.warmup={float(warmup(lengths(len(tuned.results), given.steps)))}"]
        planned = None
        if not (folder / "grid").exists():
            planned = []
            for result in tuned.results:
                vary = [f"{key}={value}" for key, value in result.trial.point.items()]
                planned += plan_points(vary, None, 0, own, None, {})
        grid, code = run_sweep(folder / "grid", planned, 1, lambda trial, what: None, True)
        if code:
            raise SystemExit(code)
        print(json.dumps(compare(tuned, grid, given.steps)))


def compare(tuned: Tuned, grid: Sequence[TrialResult], steps: int) -> dict[str, Any]:
    """The pick of the search beside the best point of the grid, whose runs have `steps` steps, and what both took."""
    per_step = {_key(trial): _seconds_per_step(trial) for trial in grid}
    keys = {result.trial.name: _key(result) for result in tuned.results}
    shorter = {b: a for a, b in itertools.pairwise(sorted({score.steps for score in tuned.scores}))}
    computed = [
        (score.steps - (hold(shorter[score.steps]) if score.steps in shorter else 0), keys[score.trial])
        for score in tuned.scores
    ]
    pick = min(tuned.scores, key=lambda score: score.loss)
    best, best_point = min(((_lowest(trial), trial.trial.point) for trial in grid), key=lambda pair: pair[0])
    seconds = sum(num_steps * per_step[key] for num_steps, key in computed)
    grid_seconds = steps * sum(per_step.values())
    return {
        "pick": tuned.results[0].trial.point,
        "length_of_pick": pick.steps,
        "best": best_point,
        "loss_of_pick": pick.loss,
        "loss_of_best": best,
        "above_best": pick.loss / best - 1,
        "steps": sum(num_steps for num_steps, _ in computed),
        "grid_steps": steps * len(grid),
        "seconds": seconds,
        "grid_seconds": grid_seconds,
        "part": seconds / grid_seconds,
    }


def _key(result: TrialResult) -> tuple[Any, ...]:
    return tuple(result.trial.point.values())


def _lowest(result: TrialResult) -> float:
    """The lowest held-out loss of a run."""
    events = read_metrics(result.trial.run.metrics_file)
    return min(event["loss"] for event in events if event["event"] == "heldout")


def _seconds_per_step(result: TrialResult) -> float:
    steps = [event for event in read_metrics(result.trial.run.metrics_file) if event["event"] == "step"]
    return float(statistics.median(event["seconds"] for event in steps))


if __name__ == "__main__":
    main()
