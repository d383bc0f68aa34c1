"""Acceptance on one GPU: is it right, and is it fast.

    python -m benchmarks.gpu [--json FILE] [--seconds 540] [--only PART ...] [--simulate] [--short]

It needs the repository, torch for CUDA, triton and the direct dependencies of lorafit, and no network. transformers,
peft, liger-kernel, bitsandbytes and fastapi are used where they are installed. `--simulate` tries what it can without a
GPU, on the simulated device of tests/gpu (Linux and a C++ compiler), so that no minute on a device goes into a fault of
this program. The last lines are the table of goals beside what was measured, the checks that failed, and how many
passed. The exit code is 1 where a check failed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import gc
import importlib
import importlib.metadata
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_results import FAILED, Results

SPEED_SECONDS = 270.0  # of the time for speed; checks that would begin within it are left out
PACKAGES = ("torch", "triton", "transformers", "peft", "liger-kernel", "bitsandbytes", "numpy")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="the file for all results")
    parser.add_argument("--seconds", type=float, default=540.0, help="for all of it")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="words in the names of parts")
    parser.add_argument("--simulate", action="store_true", help="on the simulated device of tests/gpu")
    parser.add_argument("--short", action="store_true", help="few families, no speed")
    given = parser.parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    results = Results(end=time.monotonic() + given.seconds)
    with contextlib.ExitStack() as stack:
        if given.simulate:
            os.environ["TRITON_INTERPRET"] = "1"
            importlib.import_module("tests.gpu.guard")  # before torch
            stack.enter_context(importlib.import_module("tests.gpu.simulated").simulated_cuda())
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lorafit-gpu-")))
        machine = machine_facts(simulated=given.simulate)
        print("; ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
        for name, part, is_speed in parts(results, work, given.simulate, given.short):
            if not given.only or any(word in name for word in given.only):
                checks_first = (
                    SPEED_SECONDS if not (is_speed or given.simulate or given.short or given.only) else 20
                )
                results.run(name, part, checks_first)
                gc.collect()
    given.json.write_text(results.as_json(machine))
    print(f"\n{results.text()}\n{given.json}")
    return int(results.count(FAILED) > 0)


def machine_facts(*, simulated: bool) -> dict[str, Any]:
    """What the figures depend on."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return {
        "device": "simulated" if simulated else properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory GB": round(properties.total_memory / 1e9),
        "CUDA": torch.version.cuda,
        **found,
        "python": sys.version.split()[0],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def parts(results: Results, work: Path, simulated: bool, short: bool) -> list[tuple[str, Any, bool]]:
    """Name, work, and whether it measures speed, in the order in which they run."""
    from benchmarks import gpu_checks, gpu_runs

    call = functools.partial
    found = [
        ("operations", call(gpu_checks.operations, results, simulated), False),
        ("attention", call(gpu_checks.attention, results, simulated), False),
        ("families", call(gpu_checks.families, results, short), False),
        ("kernels", call(gpu_checks.kernels, results, simulated), False),
        ("passes", call(gpu_checks.passes, results, short), False),
        ("quantised", call(gpu_checks.quantised, results, simulated), False),
        ("loss", call(gpu_checks.loss, results), False),
        ("dropout", call(gpu_checks.dropout, results), False),
        ("waits", call(gpu_checks.waits, results, simulated), False),
        ("answers", call(gpu_checks.answers, results), False),
        ("whole runs", call(gpu_runs.whole_runs, results, folder(work, "runs"), simulated), False),
    ]
    if simulated:
        return found
    from benchmarks import gpu_speed

    speed, compared = call(gpu_speed.training, results, folder(work, "large")), gpu_speed.compared
    found += [
        ("memory", call(gpu_runs.memory, results), False),
        ("out of memory", call(gpu_runs.out_of_memory, results, folder(work, "short")), False),
        ("serving", call(gpu_runs.serving, results, folder(work, "runs")), False),
    ]
    if short:
        return found
    is_new = machine_facts(simulated=False)["capability"] >= "8.0"
    sixteen = "bfloat16" if is_new else "float16"
    speeds = [
        ("rates of the chip", call(gpu_speed.rates, results)),
        ("a large model", call(write_large, work / "large")),
        ("speed at 2,048 tokens", call(speed, sixteen, 2048)),
        ("speed at 16,384 tokens", call(speed, sixteen, 16384)),
        ("transformers and peft at 16,384 tokens", call(compared, results, work / "large", 16384)),
        ("speed at 4,096 tokens in float16", call(speed, "float16", 4096)),
        ("transformers and peft at 2,048 tokens", call(compared, results, work / "large", 2048)),
        ("with Liger", call(compared, results, work / "large", 16384, with_liger=True)),
        ("profile", call(gpu_speed.profile, results, 16384)),
        ("speed in int8", call(speed, sixteen, 16384, "int8")),
        ("speed in fp8", call(speed, sixteen, 16384, "fp8")),
        ("speed with recomputed layers", call(speed, sixteen, 16384, "none", "train.recompute=layers")),
        ("generation of 1", call(gpu_speed.generation, results, 1)),
        ("generation of 16", call(gpu_speed.generation, results, 16)),
        ("profile of few tokens", call(gpu_speed.profile, results, 2048)),
    ]
    return found + [(name, part, True) for name, part in speeds]


def folder(work: Path, name: str) -> Path:
    """A folder of one part."""
    path = work / name
    path.mkdir(exist_ok=True)
    return path


def write_large(work: Path) -> None:
    """The model and the rows of the runs that are timed."""
    from benchmarks import gpu_runs

    gpu_runs.write_large(work / "model")
    gpu_runs.write_texts(work / "rows.jsonl", 16384, 150)


if __name__ == "__main__":
    sys.exit(main())
