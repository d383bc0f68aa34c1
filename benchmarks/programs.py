"""The programs that speed.py compares: start, supervision and output. Imports no torch, see `watch`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

THREADS = 2  # the value in both baseline scripts
PACK_TOKENS = 2048
PACK_ROWS = 10  # rows that fill a pack, see rows.py
RUNS = "speed-runs"  # folder for run directories in the work folder
LONGEST_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Program:
    """One program with its settings.

    `arguments` are overrides for lorafit and options for a baseline. `measured` is the number of measured steps in
    each part of the run, without the warm-up step; 0 omits the part. `length`, if given, is the run's
    `train.max_steps`: the process is killed after the measured steps.
    """

    name: str
    kind: Literal["lorafit", "seed_recipe", "trl_sft"]
    arguments: tuple[str, ...]
    measured: tuple[int, ...]
    length: int | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step as the program reports it; None where it reports nothing."""

    seconds: float
    rows: int | None = None
    tokens: int | None = None  # without padding
    supervised: int | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """One process of a program. The first of `steps` is the warm-up step; times start with the process."""

    program: str
    part: int
    steps: list[Step] = field(default_factory=list)
    ready_seconds: float | None = None  # lorafit only: everything is loaded, and the first step begins
    first_step_seconds: float | None = None  # the first optimizer step is done
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    error: str = ""

    @property
    def measured(self) -> list[Step]:
        """The steps without the warm-up."""
        return self.steps[1:]


_CLASSIC_STEPS, _PACKED_STEPS = (5, 5), (3, 2)
_PACK = f"train.batch_size={PACK_ROWS}"
_ANSWERS = (_PACK, "data.train_on=response")
_ALL_LINEARS = ("lora.targets=all-linear", "lora.rank=16", "lora.alpha=32")


def _lorafit(name: str, *overrides: str, measured: tuple[int, ...] = _PACKED_STEPS) -> list[Program]:
    """A setting, with a 16-bit and with an 8-bit base."""
    sixteen = ("model.dtype=bfloat16", *overrides)
    eight = (*sixteen, "model.quantize=int8")
    return [
        Program(f"{name}, bfloat16", "lorafit", sixteen, measured),
        Program(f"{name}, int8", "lorafit", eight, measured),
    ]


PROGRAMS = [
    *_lorafit("classic", measured=_CLASSIC_STEPS),
    *_lorafit("classic in packs", _PACK),
    *_lorafit("answers in packs", *_ANSWERS),
    _lorafit("q and v, r=8, no dropout", *_ANSWERS, "lora.dropout=0")[0],
    _lorafit("all linears, r=16, no dropout", *_ANSWERS, "lora.dropout=0", *_ALL_LINEARS)[0],
    Program("trl_sft", "trl_sft", (), (3, 2)),
    Program("seed_recipe float32", "seed_recipe", ("--in-order",), (5,)),
    Program("seed_recipe bfloat16", "seed_recipe", ("--in-order", "--dtype", "bfloat16"), (5,)),
]


def command(program: Program, model: str, rows: str, baselines: str, output: str, steps: int) -> list[str]:
    """The command of `program` for `steps` steps. lorafit writes to `output`, a baseline to its working directory."""
    if program.kind == "lorafit":
        fixed = ["run.samples=0", "run.offline=true", "data.holdout=0", "data.shuffle=false"]
        paths = ["--model", model, "--data", rows, "--output", output]
        length = f"train.max_steps={program.length or steps}"
        return [
            sys.executable,
            "-m",
            "lorafit",
            "train",
            "classic",
            *paths,
            *program.arguments,
            *fixed,
            length,
        ]
    script = f"{baselines}/{program.kind}.py"
    return [sys.executable, script, model, rows, "--steps", str(steps), *program.arguments]


def run(
    program: Program, part: int, steps: int, model: Path, rows: Path, baselines: Path, work: Path
) -> Outcome:
    """Run `program` in a new process for a warm-up step and `steps` measured steps; `error` describes a failure."""
    name = f"{program.name}-{part}".replace(", ", "-").replace(" ", "-").replace("=", "")
    output = work / RUNS / name
    output.parent.mkdir(exist_ok=True)
    words = command(program, str(model), str(rows), str(baselines), str(output), steps + 1)
    stdout = work / f"{name}.out"
    record = output / "metrics.jsonl" if program.kind == "lorafit" else stdout
    ended = watch(words, work, stdout, record, steps + 1 if program.length else None)
    measured = parse_steps(_text(record), PACK_TOKENS if program.kind == "trl_sft" else None)
    error = ""
    if len(measured) <= steps:
        error = f"{len(measured)} of {steps + 1} steps, exit code {ended.exit_code}"
    return Outcome(
        program.name,
        part,
        measured,
        ended.seen.get("run_started"),
        ended.seen.get("step"),
        ended.wall_seconds,
        ended.cpu_seconds,
        ended.peak_bytes,
        error,
    )


@dataclass(frozen=True, slots=True)
class Ended:
    """A finished process. `seen` maps each kind of event to the seconds from the start to its first occurrence."""

    exit_code: int
    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int
    seen: Mapping[str, float]


def watch(words: Sequence[str], cwd: Path, stdout: Path, record: Path, kill_after: int | None) -> Ended:
    """Run `words` in `cwd`. Its output goes to `stdout` and a file .err beside it; `record` is read as it grows.

    The peak is the kernel's count for the process (ru_maxrss). On Linux the count of a new process starts with the
    memory of its parent, so this module imports no large module. The process is killed after `kill_after` steps.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(THREADS),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    seen: dict[str, float] = {}
    read = 0
    with stdout.open("wb") as out, stdout.with_suffix(".err").open("wb") as err:
        started = time.monotonic()
        process = subprocess.Popen(words, cwd=cwd, stdout=out, stderr=err, env=environment)
        try:
            while True:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                elapsed = time.monotonic() - started
                if record.exists() and record.stat().st_size > read:
                    text = _text(record)
                    read = record.stat().st_size
                    if '"run_started"' in text:
                        seen.setdefault("run_started", elapsed)
                    done = len(parse_steps(text, None))
                    if done:
                        seen.setdefault("step", elapsed)
                    if kill_after is not None and done >= kill_after and not pid:
                        process.send_signal(signal.SIGKILL)
                if pid:
                    process.returncode = os.waitstatus_to_exitcode(status)
                    break
                if elapsed > LONGEST_SECONDS:
                    process.send_signal(signal.SIGKILL)
                time.sleep(0.02)
        finally:
            if process.returncode is None:
                process.kill()
                process.wait()
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Ended(process.returncode, elapsed, usage.ru_utime + usage.ru_stime, peak, seen)


def parse_steps(text: str, tokens: int | None) -> list[Step]:
    """The steps among JSON lines: lorafit's metrics.jsonl or a baseline's output. Other lines are ignored.

    `tokens` is the number of tokens of a step whose line does not contain it.
    """
    steps = []
    for line in text.splitlines():
        try:
            event = json.loads(line) if line.startswith("{") else None
        except ValueError:  # an incomplete line
            continue
        if (
            isinstance(event, dict)
            and event.get("event", "step") == "step"
            and {"step", "seconds"} <= event.keys()
        ):
            real = event.get("tokens", event.get("real_tokens", tokens))
            steps.append(Step(event["seconds"], event.get("rows"), real, event.get("supervised_tokens")))
    return steps


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
