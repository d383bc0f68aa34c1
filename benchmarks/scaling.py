"""Scaling over ranks: measured and predicted step of two ranks, and the same formula for up to 1,000 ranks.

    python -m benchmarks.scaling --work runs/scaling [--json scaling.json]
    python -m benchmarks.scaling --paper

The first form measures on this machine's processor, with one core per rank. It fails if the predicted step of two
ranks differs from the measured step by more than 15 %. Run nothing else during that time. The second form prints the
predictions of the formula for GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEPS, WARM_UP = 24, 4
TOLERANCE = 0.15
SHAPE = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "num_attention_heads": 8}
BACKWARD = 0.6  # part of a step's passes that can overlap with an all-reduce
_SUM = """
import sys, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
tensor = torch.ones(int(sys.argv[1]) // 4)
seconds = []
for _ in range(30):
    dist.barrier()
    started = time.perf_counter()
    dist.all_reduce(tensor)
    seconds.append(time.perf_counter() - started)
if dist.get_rank() == 0:
    print(sorted(seconds)[len(seconds) // 2])
dist.destroy_process_group()
"""


@dataclass(frozen=True, slots=True)
class Link:
    """A connection of ranks: bytes per second in each direction, and seconds per message."""

    name: str
    bandwidth: float
    latency: float


def all_reduce_seconds(num_bytes: float, ranks: int, link: Link) -> float:
    """Each rank sends and receives 2 (N - 1) / N of the bytes (ring), with the latency of 2 log2 N rounds (trees)."""
    rounds = 2 * max(1, (ranks - 1).bit_length())
    return 0.0 if ranks == 1 else 2 * (ranks - 1) / ranks * num_bytes / link.bandwidth + rounds * link.latency


def step_seconds(compute: float, imbalance: float, all_reduce: float, *, overlap: bool) -> float:
    """A step of ranks that each compute for `compute` seconds: the slowest rank plus the all-reduce without overlap."""
    hidden = BACKWARD * compute if overlap else 0.0
    return compute * (1 + imbalance) + max(0.0, all_reduce - hidden)


def paper() -> str:
    """Predictions for TinyLlama on H100s: 16 rows of 151 tokens per rank and step, all linear layers at rank 16."""
    adapter = 12.6e6 * 4  # bytes of float32 gradients
    # Forward and input gradients at half the chip's dense bfloat16 rate.
    compute = 16 * 151 * 4 * 1.0e9 / 200e12
    links = [
        Link("NVLink 450 GB/s", 450e9, 5e-6),
        Link("InfiniBand 400 Gbit/s", 50e9, 1e-5),
        Link("Ethernet 25 Gbit/s", 3.1e9, 5e-5),
        Link("Ethernet 1 Gbit/s", 0.12e9, 1e-4),
    ]
    lines = [f"passes {compute * 1e3:.0f} ms, adapter {adapter / 1e6:.0f} MB", ""]
    lines += ["| link | 2 | 8 | 64 | 256 | 1,000 |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for link in links:
        cells = []
        for ranks in (2, 8, 64, 256, 1000):
            whole = step_seconds(compute, 0.05, all_reduce_seconds(adapter, ranks, link), overlap=True)
            cells.append(f"{compute / whole:.0%}")
        lines.append(f"| {link.name} | {' | '.join(cells)} |")
    lines += ["", "| model | bfloat16 | int8 |", "| --- | ---: | ---: |"]
    for name, parameters in (("1.1 B", 1.1e9), ("8 B", 8e9), ("70 B", 70e9), ("405 B", 405e9)):
        needs = [parameters * width + parameters * 0.012 * 16 + 6e9 for width in (2, 1)]
        lines.append(f"| {name} | {' | '.join(_strategy(need) for need in needs)} |")
    lines += [
        "",
        "| link | tokens per pass that hide the all-gather: bfloat16 | int8 |",
        "| --- | ---: | ---: |",
    ]
    for link in links:
        # 2 all-gathers of `width` bytes per parameter, and 4 FLOPs per parameter and token
        cells = [f"{2 * width * 200e12 / 4 / link.bandwidth:,.0f}" for width in (2, 1)]
        lines.append(f"| {link.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _strategy(needed: float) -> str:
    size = f"{needed / 1e9:,.0f} GB"
    return f"{size}: ddp" if needed < 75e9 else f"{size}: fsdp over {int(-(-needed // 60e9))}"


def measure(work: Path) -> dict[str, Any]:
    """Measure one rank with all rows and with half of the rows, two ranks, and the all-reduce alone."""
    from tests.tiny_models import write_model, write_rows

    work.mkdir(parents=True, exist_ok=True)
    model = write_model(work / "model", num_key_value_heads=8, **SHAPE)
    rows = write_rows(work / "rows.json", 600)
    common = [
        "model.dtype=float32",
        "model.device=cpu",
        "lora.rank=16",
        f"train.max_steps={STEPS}",
        "data.holdout=0",
    ]
    common += ["run.samples=0", "run.verify=false", "train.save_every=1000"]
    command = ["train", "--model", str(model), "--data", str(rows), *common]

    def run(name: str, batch: int, processes: int) -> list[dict[str, Any]]:
        output = work / f"{name}-{time.time_ns()}"
        many = ["--nproc", str(processes)] if processes > 1 else []
        words = [
            sys.executable,
            "-m",
            "lorafit",
            *command,
            *many,
            f"train.batch_size={batch}",
            "--output",
            str(output),
        ]
        subprocess.run(
            words, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL
        )
        events = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return [event for event in events if event["event"] == "step"][WARM_UP:]

    def median(steps: Sequence[dict[str, Any]]) -> float:
        return statistics.median(step["seconds"] for step in steps)

    whole, half, two = run("whole", 32, 1), run("half", 16, 1), run("two", 32, 2)
    adapter = _adapter_bytes(work)
    all_reduce = _all_reduce(adapter)
    imbalance = statistics.mean(step["imbalance"] for step in two)
    # Two ranks of one machine share memory and caches. For a model this small, no overlap is the safer assumption.
    predicted = step_seconds(median(half), imbalance, all_reduce, overlap=False)
    return {
        "adapter_bytes": adapter,
        "all_reduce_seconds": all_reduce,
        "imbalance": imbalance,
        "one_rank_seconds": median(whole),
        "one_rank_half_the_rows_seconds": median(half),
        "two_ranks_seconds": median(two),
        "predicted_seconds": predicted,
        "error": predicted / median(two) - 1,
        "efficiency": median(whole) / 2 / median(two),
    }


def _adapter_bytes(work: Path) -> int:
    from safetensors.torch import load_file

    adapter = next(work.glob("two-*/adapter/adapter_model.safetensors"))
    return sum(tensor.numel() * 4 for tensor in load_file(adapter).values())


def _all_reduce(num_bytes: int) -> float:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    words = [sys.executable, "-c", _SUM, str(num_bytes)]
    processes = [
        subprocess.Popen(words, env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    outputs = [process.communicate()[0] for process in processes]
    return float(outputs[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--paper", action="store_true")
    arguments = parser.parse_args()
    if arguments.paper:
        print(paper())
        return
    figures = measure(arguments.work)
    for name, value in figures.items():
        print(f"{name:32} {value:,.4g}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    if abs(figures["error"]) > TOLERANCE:
        sys.exit(
            f"the error of the prediction is {figures['error']:+.0%}; at most {TOLERANCE:.0%} is allowed"
        )


if __name__ == "__main__":
    main()
