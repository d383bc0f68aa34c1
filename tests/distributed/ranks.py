"""Starts the ranks of a run as torchrun would, without its agent; run as a script it is one of these ranks."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tests.forked import Forked

ROOT = Path(__file__).parents[2]


def together(world_size: int, jobs: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Have `world_size` processes do `jobs` one after the other; returns what the ranks said of each, last one first.

    A job is {"settings": [...]} for a new run or {"resume": PATH}, with {"stop": [RANK, STEP]} to send that rank a
    SIGTERM while it computes that step.
    """
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )  # it has its port: no race for one
    plan = folder / f"jobs-{world_size}.json"
    plan.write_text(json.dumps(jobs))
    shared = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
    address = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    said = []
    with ExitStack() as stack:
        started = [
            stack.enter_context(
                Forked(
                    "tests.distributed.ranks",
                    str(plan),
                    env={**os.environ, **shared, **address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    cwd=ROOT,
                )
            )
            for rank in range(world_size)
        ]
        for process in started:
            out, error = process.communicate()
            assert process.returncode == 0, error
            said.append([json.loads(line) for line in out.splitlines()])
    return [{"ranks": list(answers)} for answers in zip(*said, strict=True)]


def _main() -> None:
    from lorafit.config.load import load_config
    from lorafit.training import loop
    from lorafit.training.run import resume_run, start_run

    rank = int(os.environ["RANK"])
    gradients = loop._gradients
    engines = []

    stop: list[int] = []

    def watched(given: loop.TrainContext, state: Any, *rest: Any) -> Any:
        engines[:] = [given.engine]
        if stop == [rank, state.step + 1]:
            os.kill(os.getpid(), signal.SIGTERM)
        return gradients(given, state, *rest)

    loop._gradients = watched
    for job in json.loads(Path(sys.argv[1]).read_text()):
        stop[:] = job.get("stop", [])
        if "resume" in job:
            result = resume_run(job["resume"], quiet=True)
        else:
            result = start_run(load_config(None, job["settings"]), quiet=True)
        reduced = engines[0].reduced_bytes if engines else 0
        print(
            json.dumps({"step": result.step, "finished": result.finished, "reduced_bytes": reduced}),
            flush=True,
        )


if __name__ == "__main__":
    _main()
