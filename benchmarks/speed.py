"""Speed and memory of lorafit, the classic script and TRL on the same rows, alternately in one run.

    python -m benchmarks.speed [--quick] [--work DIR] [--json FILE] [--only NAME ...]
    python -m benchmarks.speed --markdown FILE.json [--into docs/benchmarks.md]

Needs the files beside the project (../shared or LORAFIT_SHARED) and `pip install -e '.[bench]'`. The whole of TinyLlama
with random weights takes about three quarters of an hour on two cores. docs/benchmarks.md defines each figure.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# For a start as a file: makes `benchmarks.x` importable, and keeps profile.py from hiding the standard module.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.marks import put_between
from benchmarks.programs import (
    PACK_ROWS,
    PACK_TOKENS,
    PROGRAMS,
    RUNS,
    THREADS,
    Outcome,
    Program,
    command,
    run,
)
from benchmarks.report import report
from benchmarks.rows import write_rows
from benchmarks.targets import head_parameters, linear_parameters

PACKAGES = ("lorafit", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "tokenizers")
Turn = tuple[Program, int, int]  # program, part of the run, steps to measure


def schedule(programs: Sequence[Program]) -> list[Turn]:
    """The order of the turns: the first parts in order, the second parts in reverse order, and so on."""
    turns = []
    for part in range(max((len(program.measured) for program in programs), default=0)):
        present = [program for program in programs if len(program.measured) > part and program.measured[part]]
        turns += [
            (program, part, program.measured[part]) for program in (present[::-1] if part % 2 else present)
        ]
    return turns


def one_part(programs: Sequence[Program]) -> list[Program]:
    """Each program in one part, with the measured steps of all its parts, at most five."""
    return [replace(program, measured=(min(5, sum(program.measured)),)) for program in programs]


def quick(programs: Sequence[Program]) -> list[Program]:
    """One measured step of each program, without the slow baseline that no target uses."""
    return [replace(program, measured=(1,)) for program in programs if program.name != "seed_recipe bfloat16"]


def measure(
    programs: Sequence[Program], model: Path, shared: Path, work: Path, every: int, out: Path | None
) -> dict[str, Any]:
    """Run all turns and return the raw record. Every `every` turns and at the end, measure the machine's limits.

    `out` is written after each turn, so the results of an interrupted run are not lost.
    """
    config = json.loads((model / "config.json").read_text())
    rows = work / "rows.json"
    num_packs = 2 + max(max(program.measured) for program in programs)
    mean = write_rows(
        shared / "data" / "alpaca_en_demo.json",
        model / "tokenizer.json",
        rows,
        num_packs,
        PACK_ROWS,
        PACK_TOKENS,
    )
    turns = schedule(programs)
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(["python", "-m", "benchmarks.speed", *_without_paths(sys.argv[1:])]),
        "machine": machine(),
        "versions": versions(),
        "model": {
            "config": config,
            "linear_parameters": linear_parameters(config),
            "head_parameters": head_parameters(config),
        },
        "rows": {"file": "alpaca_en_demo.json", "mean_tokens": round(mean, 2)},
        "programs": {
            program.name: shlex.join(
                ["python", *command(program, "MODEL", "ROWS", "shared/baselines", "RUN", 1 + steps)[1:]]
            )
            for program, part, steps in turns
            if part == 0
        },
        "limits": [],
        "outcomes": [],
    }
    started = time.monotonic()
    for number, (program, part, steps) in enumerate(turns):
        if number % every == 0:
            record["limits"].append(limits(model))
        _read(model)
        outcome = run(program, part, steps, model, rows, shared / "baselines", work)
        record["outcomes"].append(asdict(outcome))
        _print(f"[{number + 1}/{len(turns)}, {(time.monotonic() - started) / 60:.0f} min] {_line(outcome)}")
        if outcome.error:
            _print_log_end(work)
        _write(record, out)
    record["limits"].append(limits(model))
    _write(record, out)
    return record


def limits(model: Path) -> dict[str, dict[str, float]]:
    """GFLOP/s of the machine's products now, measured in a new process."""
    script = Path(__file__).with_name("machine.py")
    words = [sys.executable, "-P", str(script), str(model), "--threads", str(THREADS)]
    done = subprocess.run(words, stdout=subprocess.PIPE, check=True, text=True)
    rates: dict[str, dict[str, float]] = json.loads(done.stdout)
    _print("limits: " + ", ".join(f"{name} {rate['both']:.0f} GFLOP/s" for name, rate in rates.items()))
    return rates


def machine() -> dict[str, Any]:
    """Processor, threads and memory; nothing that identifies the computer."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*: (.+)$", text, re.MULTILINE)
    instructions = r"avx2|avx512f|avx512_bf16|avx512_vnni|avx_vnni|amx_\w+"
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": name[1] if name else platform.processor() or platform.machine(),
        "flags": re.findall(rf"\b(?:{instructions})\b", flags[1]) if flags else [],
        "cores": os.cpu_count(),
        "threads": THREADS,
        "memory_gb": round(pages / 1e9),
        "load_at_start": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()}",
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the installed PACKAGES."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


def shared_folder() -> Path:
    """The folder of files beside the project. Raises SystemExit if a file is missing."""
    path = Path(os.environ.get("LORAFIT_SHARED") or Path(__file__).resolve().parents[2] / "shared").resolve()
    for name in ("baselines/seed_recipe.py", "baselines/trl_sft.py", "tools/random_weights.py"):
        if not (path / name).is_file():
            raise SystemExit(
                f"error: shared/{name} is missing: set LORAFIT_SHARED to the folder that contains it"
            )
    return path


def random_model(shared: Path, work: Path, layers: int) -> Path:
    """TinyLlama's shape with `layers` layers and random bfloat16 weights, created once in `work`."""
    folder = work / f"model-{layers}"
    if not (folder / "done").exists():
        _print(f"creating a model with {layers} layers and random weights")
        skeleton = shared / "models" / "tinyllama-1.1b-chat-skeleton"
        script = shared / "tools" / "random_weights.py"
        words = [sys.executable, str(script), str(skeleton), str(folder), "--layers", str(layers)]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        (folder / "done").touch()
    return folder


def main() -> None:
    names = [program.name for program in PROGRAMS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="folder for model, runs and logs; it is kept")
    parser.add_argument("--layers", type=int, help="layers of the model (22; 4 with --quick)")
    parser.add_argument("--quick", action="store_true", help="some minutes: 4 layers, one measured step")
    parser.add_argument(
        "--once", action="store_true", help="one process and five measured steps of each program"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help=f"of: {'; '.join(names)}")
    parser.add_argument(
        "--every", type=int, default=5, help="programs between two measurements of the limits"
    )
    parser.add_argument("--json", type=Path, help="write all raw figures to this file")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="only print the tables of an earlier --json file"
    )
    parser.add_argument(
        "--into", type=Path, help="with --markdown: write the tables between the marks of this page"
    )
    parser.add_argument("--marks", default="speed", metavar="NAME", help="with --into: the name of the marks")
    arguments = parser.parse_args()
    if arguments.markdown:
        part = report(json.loads(arguments.markdown.read_text(encoding="utf-8")))
        if arguments.into:
            put_between(arguments.into, arguments.marks, part)
        else:
            print(part, end="")
        return
    shared = shared_folder()
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
    chosen = [program for program in PROGRAMS if program.name in (arguments.only or names)]
    programs = quick(chosen) if arguments.quick else one_part(chosen) if arguments.once else chosen
    with tempfile.TemporaryDirectory() as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        model = random_model(shared, work, arguments.layers or (4 if arguments.quick else 22))
        shutil.rmtree(work / RUNS, ignore_errors=True)
        record = measure(programs, model, shared, work, arguments.every, arguments.json)
    print(report(record), end="")
    failed = sum(bool(outcome["error"]) for outcome in record["outcomes"])
    if failed:
        raise SystemExit(f"error: {failed} of {len(record['outcomes'])} processes failed, see above")


def _without_paths(words: Sequence[str]) -> Iterator[str]:
    """The arguments, but only the last part of a path: a record contains no folder names of the machine."""
    for word in words:
        yield Path(word).name if "/" in word or os.sep in word else word


def _read(model: Path) -> None:
    """Read the weights into the file cache, so that every process starts with a warm cache."""
    with (model / "model.safetensors").open("rb") as file:
        while file.read(2**24):
            pass


def _line(outcome: Outcome) -> str:
    """One process as one line."""
    steps = " ".join(f"{step.seconds:.2f}" for step in outcome.measured)
    first = f"{outcome.steps[0].seconds:.2f}" if outcome.steps else "-"
    return (
        f"{outcome.program}: {steps or '-'} s (first {first}), {outcome.peak_bytes / 1e9:.2f} GB, "
        f"{outcome.wall_seconds:.0f} s in total" + (f"; {outcome.error}" if outcome.error else "")
    )


def _write(record: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _print_log_end(work: Path) -> None:
    """Print the last lines of the newest process's stderr."""
    logs = sorted(work.glob("*.err"), key=lambda path: path.stat().st_mtime)
    for line in logs[-1].read_text(errors="replace").strip().splitlines()[-6:] if logs else []:
        _print(f"    {line}")


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
