"""Measures a run with a time budget: how far its end is from the budget, and its held-out loss beside a planned run.

    python benchmarks/budget.py --model MODEL --data ROWS [--budget 2min] [section.key=value ...]

Both runs are commands of their own. The planned one has as many steps, with the schedule `cosine`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lorafit.config.fields import budget_seconds
from lorafit.observe.metrics_file import read_metrics


def last_heldout(path: Path) -> tuple[int, float]:
    """(step, held-out loss) of the last measurement."""
    found = [event for event in read_metrics(path / "metrics.jsonl") if event["event"] == "heldout"]
    return int(found[-1]["step"]), float(found[-1]["loss"])


def main() -> None:
    """Run both and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--budget", default="2min")
    parser.add_argument("settings", nargs="*")
    given = parser.parse_args()
    seconds = budget_seconds(given.budget)
    assert seconds is not None
    command = [sys.executable, "-m", "lorafit", "train", "--model", given.model, "--data", given.data]
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        own = ["--output", f"{folder}/timed", f"train.budget={given.budget}"]
        subprocess.run([*command, *own, *given.settings], check=True)
        took = time.monotonic() - started
        steps, loss = last_heldout(Path(folder, "timed"))
        own = ["--output", f"{folder}/planned", f"train.max_steps={steps}", "run.verify=false"]
        subprocess.run([*command, *own, *given.settings], check=True)
        _, planned = last_heldout(Path(folder, "planned"))
    result = {"budget": seconds, "seconds": took, "off": took / seconds - 1, "steps": steps}
    print(json.dumps({**result, "loss": loss, "planned_loss": planned, "above_planned": loss / planned - 1}))


if __name__ == "__main__":
    main()
