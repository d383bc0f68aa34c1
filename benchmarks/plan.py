"""The accuracy of `lorafit plan`: three models in four settings, each planned, then trained in a new process.

    python -m benchmarks.plan --work runs/bench [--models 656k 4 22] [--settings ...] [--json FILE]

Prints a table: steps, predicted and measured peak memory (ru_maxrss, from the kernel), predicted and measured seconds
of the steps and of the whole process, and the errors. Run nothing else on the machine during that time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.programs import parse_steps, watch
from benchmarks.speed import machine, random_model, shared_folder, versions

MEMORY_BOUND, TIME_BOUND = 0.10, 0.15
SETTINGS = {
    "bfloat16, q and v": ("model.dtype=bfloat16", "lora.targets=[q_proj,v_proj]", "lora.rank=8"),
    "bfloat16, all linears": ("model.dtype=bfloat16",),
    "int8, all linears": ("model.dtype=bfloat16", "model.quantize=int8"),
    "recompute, small passes": (
        "model.dtype=bfloat16",
        "train.recompute=layers",
        "train.micro_batch_tokens=768",
    ),
}
FIXED = ("data.template=alpaca", "data.max_length=512", "data.too_long=drop", "train.batch_size=6")
FIXED += ("run.samples=0", "run.offline=true", "data.holdout=4", "train.eval_every=1000")
STEPS = {"656k": 60, "4": 6, "22": 2}


@dataclass(frozen=True, slots=True)
class Row:
    """One model in one setting: predicted and measured values, in bytes and seconds."""

    model: str
    settings: str
    steps: int
    predicted_bytes: int
    measured_bytes: int
    predicted_step_seconds: float
    measured_step_seconds: float
    predicted_seconds: float
    measured_seconds: float
    plan: dict[str, Any]

    @property
    def memory_error(self) -> float:
        """Relative error of the predicted peak memory."""
        return self.predicted_bytes / self.measured_bytes - 1

    @property
    def time_error(self) -> float:
        """Relative error of the predicted wall time of the process."""
        return self.predicted_seconds / self.measured_seconds - 1

    @property
    def step_error(self) -> float:
        """Relative error of the predicted seconds of all steps."""
        return self.predicted_step_seconds / self.measured_step_seconds - 1


def measure(model: Path, name: str, setting: str, rows: Path, work: Path, steps: int) -> Row:
    """Plan, then train in a new process. Raises SystemExit if one of them fails."""
    output = work / "plan-runs" / f"{name}-{setting}".replace(" ", "-").replace(",", "")
    shutil.rmtree(output, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    words = ["--model", str(model), "--data", str(rows), "--output", str(output), *FIXED, *SETTINGS[setting]]
    words.append(f"train.max_steps={steps}")
    lorafit = [sys.executable, "-m", "lorafit"]
    stdout = work / f"{output.name}.out"
    planned = watch([*lorafit, "plan", *words, "--json"], work, stdout, work / "none", None)
    if planned.exit_code:
        raise SystemExit(f"error: plan failed: {stdout.with_suffix('.err').read_text(encoding='utf-8')}")
    plan = json.loads(stdout.read_text(encoding="utf-8"))
    record = output / "metrics.jsonl"
    ended = watch([*lorafit, "train", *words], work, stdout, record, None)
    if ended.exit_code:
        raise SystemExit(f"error: train failed: {stdout.with_suffix('.err').read_text(encoding='utf-8')}")
    done = parse_steps(record.read_text(encoding="utf-8"), None)
    assert plan["steps"] == len(done)
    assert plan["supervised_tokens"] == sum(step.supervised or 0 for step in done)
    return Row(
        name,
        setting,
        len(done),
        plan["peak_bytes"],
        ended.peak_bytes,
        plan["times"]["steps"],
        sum(step.seconds for step in done),
        plan["times"]["total"],
        ended.wall_seconds,
        plan,
    )


def table(rows: list[Row]) -> str:
    """The rows as Markdown; a `!` marks an error beyond its bound."""
    lines = [
        "| model | settings | steps | memory GB: planned | measured | error | s per process: planned | measured "
        "| error | error of the steps |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        memory = f"{row.memory_error:+.1%}" + ("" if abs(row.memory_error) <= MEMORY_BOUND else " !")
        time = f"{row.time_error:+.1%}" + ("" if abs(row.time_error) <= TIME_BOUND else " !")
        cells = [
            f"{row.predicted_bytes / 1e9:.2f}",
            f"{row.measured_bytes / 1e9:.2f}",
            memory,
            f"{row.predicted_seconds:.1f}",
            f"{row.measured_seconds:.1f}",
            time,
            f"{row.step_error:+.1%}",
        ]
        lines.append(f"| {row.model} | {row.settings} | {row.steps} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="folder for models and runs; it is kept for the next run")
    parser.add_argument("--models", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--steps", type=int, help="steps of each run")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    shared = shared_folder()
    measured: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        for name in arguments.models:
            small = shared / "models" / "tinystories-656k"
            model = small if name == "656k" else random_model(shared, work, int(name))
            for setting in arguments.settings:
                rows = shared / "data" / "alpaca_en_demo.json"
                steps = arguments.steps or STEPS[name]
                measured.append(measure(model, name, setting, rows, work, steps))
                print(table(measured[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
                if arguments.json:
                    facts = {
                        "machine": machine(),
                        "versions": versions(),
                        "rows": [asdict(r) for r in measured],
                    }
                    arguments.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(table(measured))
    beyond = [
        row for row in measured if abs(row.memory_error) > MEMORY_BOUND or abs(row.time_error) > TIME_BOUND
    ]
    if beyond:
        raise SystemExit(f"error: {len(beyond)} of {len(measured)} predictions are beyond their bounds")


if __name__ == "__main__":
    main()
