"""Compares the same runs of two versions of lorafit: adapter bytes, metrics and the loss curves of the report.

    python -m benchmarks.unchanged --against REVISION [--work FOLDER] [--only NAME ...] [--resume-old]

REVISION is checked out into a temporary folder. Each version trains the same set of runs (see RUNS) in new processes.
The results must agree in every byte of the adapter, in every number of metrics.jsonl except times and memory, in the
ledger, and in the curves of the report. With `--resume-old`, REVISION also starts each interrupted run and this tree
resumes it: the result must be that of REVISION alone. The exit code is 1 if something differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACE = ["train.batch_size=16", "train.learning_rate=2e-4"]
FILES = ["--model", "demo/model", "--data", "demo/rows.json", *PACE]
SMALL = [*FILES, "model.dtype=float32", "run.samples=2"]
RUNS: dict[str, list[str]] = {
    "demo": ["demo/recipe.yaml", "train.max_steps=60", "train.eval_every=20", "train.save_every=20"],
    "classic": ["classic", *SMALL, "train.batch_size=4", "train.max_steps=30", "train.learning_rate=1e-3"],
    "int8": ["int8", *FILES, "run.samples=2", "data.holdout=40", "train.max_steps=20"],
    "bfloat16": [
        *FILES,
        "model.dtype=bfloat16",
        "data.holdout=40",
        "train.max_steps=20",
        "train.recompute=layers",
    ],
    "accumulated": [
        *SMALL,
        "data.holdout=40",
        "train.max_steps=12",
        "train.micro_batch_tokens=128",
        "lora.dropout=0.1",
    ],
    "resumed": [*SMALL, "data.holdout=40", "train.max_steps=40", "train.save_every=10", "lora.dropout=0.1"],
    "two ranks": [*SMALL, "--nproc", "2", "data.holdout=40", "train.max_steps=12"],
}
STOPPED_AT = {"resumed": 17}  # the step after which a run is interrupted; it is then resumed
NOT_COMPARED = {"seconds", "tokens_per_second", "memory_bytes", "output", "path", "adapter", "device"}
COMPARED_EVENTS = {"run_started", "step", "heldout", "answers", "sample", "run_ended"}


def lorafit(tree: Path, words: Sequence[str]) -> subprocess.Popen[str]:
    """Start the command of the version in `tree`, in this tree, so that both versions read the same files."""
    cache = tree / ".cache" / "unchanged"
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree / "src"),
        "OMP_NUM_THREADS": "1",
        "LORAFIT_CACHE": str(cache),
    }
    command = [sys.executable, "-m", "lorafit", *words]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def train(tree: Path, words: Sequence[str], output: Path, stop_at: int | None, resume_by: Path) -> None:
    """Train a run with the version in `tree`. If it is stopped, the version in `resume_by` finishes it."""
    process = lorafit(tree, ["train", *words, "--output", str(output)])
    if stop_at is not None:
        wait_for_step(process, output / "metrics.jsonl", stop_at)
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    if stop_at is not None:
        process = lorafit(resume_by, ["train", "--resume", str(output)])
        _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"`lorafit train {' '.join(words)}` of {tree} failed:\n{errors}")


def wait_for_step(process: subprocess.Popen[str], metrics: Path, step: int) -> None:
    """Return when `metrics` has the event of `step`, or the process has ended."""
    while process.poll() is None:
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.01)


def outcome(run: Path) -> dict[str, Any]:
    """The compared parts of a run: digests of the adapter, metrics, ledger and curves of the report."""
    adapter = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in run.glob("adapter/adapter_*")
    }
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [
        {key: value for key, value in event.items() if key not in NOT_COMPARED}
        for event in events
        if event["event"] in COMPARED_EVENTS
    ]
    starts = [event for event in kept if event["event"] in ("run_started", "run_ended")]
    others = [event for event in kept if event not in starts]
    report = (run / "report.html").read_text()
    loss = re.search(r'<section id="loss">.*?</section>', report, re.DOTALL)
    assert loss is not None, f"the report of {run} has no section of losses"
    return {
        "adapter": adapter,
        "starts": starts,
        "metrics": others,
        "ledger": json.loads((run / "ledger.json").read_text()),
        "curves": re.findall(r' d="([^"]*)"', loss.group()),
        "steps": (run / "checkpoints").is_dir()
        and sorted(path.name for path in (run / "checkpoints").glob("step-*")),
    }


def differences(before: Any, after: Any, name: str = "") -> list[str]:
    """The paths at which two JSON values differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted(before.keys() | after.keys())
        return [d for key in keys for d in differences(before.get(key), after.get(key), f"{name}.{key}")]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [
            d
            for i, (b, a) in enumerate(zip(before, after, strict=True))
            for d in differences(b, a, f"{name}[{i}]")
        ]
    return [] if before == after else [f"{name}: {str(before)[:60]} -> {str(after)[:60]}"]


def main() -> int:
    """The command line; prints one line per run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", required=True, metavar="REVISION")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--only", nargs="*", choices=RUNS)
    parser.add_argument("--resume-old", action="store_true")
    arguments = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        work, old = arguments.work or Path(folder), Path(folder) / "old"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run(
            [*git, "add", "--detach", str(old), arguments.against], check=True, capture_output=True
        )
        try:
            for name in arguments.only or RUNS:
                stop_at, outputs = STOPPED_AT.get(name), []
                ways = [(old, old), (ROOT, ROOT)]
                if arguments.resume_old and stop_at is not None:
                    ways.append((old, ROOT))
                for number, (tree, resume_by) in enumerate(ways):
                    outputs.append(work / f"{name.replace(' ', '-')}-{number}")
                    train(tree, RUNS[name], outputs[-1], stop_at, resume_by)
                first = outcome(outputs[0])
                differing = [d for output in outputs[1:] for d in differences(first, outcome(output))]
                failed |= bool(differing)
                print(
                    f"{name:12} " + ("equal" if not differing else f"{len(differing)} differences"),
                    flush=True,
                )
                for line in differing[:5]:
                    print(f"    {line}")
        finally:
            subprocess.run([*git, "remove", "--force", str(old)], check=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
