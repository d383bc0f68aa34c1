"""Measures what `train.anchor` keeps: the drift from the base at equal held-out loss, with and without it.

    python benchmarks/drift.py --model MODEL --data ROWS [--steps 200] [section.key=value ...]

For each weight, one run with the same seed measures held-out loss and drift. The drift of the plain run is
interpolated at the lowest held-out loss that both runs reach.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path

from lorafit.config.load import load_config
from lorafit.observe.metrics_file import read_metrics
from lorafit.training.run import start_run

WEIGHTS = (0.0, 0.1, 0.3, 1.0)
Curve = list[tuple[float, float]]  # (held-out loss, drift) of each measurement


def curve(path: Path) -> Curve:
    """The measurements of a run, after the base's own loss with no drift."""
    events = list(read_metrics(path / "metrics.jsonl"))
    losses = {event["step"]: event["loss"] for event in events if event["event"] == "heldout"}
    drifts = {event["step"]: event["divergence"] for event in events if event["event"] == "drift"}
    base = next(event["base_loss"] for event in events if event["event"] == "heldout")
    return [(base, 0.0), *((losses[step], drifts[step]) for step in sorted(losses) if step in drifts)]


def drift_at(points: Curve, loss: float) -> float:
    """The drift where the held-out loss first falls to `loss`."""
    for (loss_before, drift_before), (loss_after, drift_after) in itertools.pairwise(points):
        if loss_after <= loss <= loss_before:
            part = (loss_before - loss) / max(loss_before - loss_after, 1e-12)
            return drift_before + part * (drift_after - drift_before)
    return points[-1][1]


def main() -> None:
    """Run and print one JSON line per weight."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("settings", nargs="*")
    given = parser.parse_args()
    every = max(1, given.steps // 12)
    words = [f"model.name={given.model}", f"data.path={given.data}", f"train.max_steps={given.steps}"]
    words += [
        f"train.eval_every={every}",
        "run.verify=false",
        "run.samples=0",
        "run.drift=true",
        "run.check=warn",
    ]
    curves: dict[float, Curve] = {}
    with tempfile.TemporaryDirectory() as folder:
        for weight in WEIGHTS:
            own = [f"train.anchor={weight}", f"run.output={folder}/{weight}"]
            started = time.perf_counter()
            run = start_run(load_config(None, [*words, *given.settings, *own]), quiet=True)
            seconds = time.perf_counter() - started
            curves[weight] = curve(run.path)
            plain, points = curves[0.0], curves[weight]
            loss = max(min(loss for loss, _ in plain), min(loss for loss, _ in points))
            both = drift_at(points, loss), drift_at(plain, loss)
            result = {"anchor": weight, "at_loss": loss, "drift": both[0], "plain_drift": both[1]}
            result |= {
                "ratio": both[0] / both[1],
                "lowest": min(loss for loss, _ in points),
                "seconds": seconds,
            }
            print(json.dumps({key: round(value, 4) for key, value in result.items()}), flush=True)


if __name__ == "__main__":
    main()
