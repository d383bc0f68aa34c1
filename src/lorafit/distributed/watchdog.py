"""Every rank's sign of life, and the verdict when a step does not come to its end: which rank stands still, and where.

A collective that waits for a lost process says only that it timed out. Here each rank has a thread that writes to
torch's key-value store where its training is. When that has not moved for most of the time-out, the thread looks at
the others: a rank whose thread is silent too is frozen or gone, one that is behind the others holds them up. The
verdict is written to `heartbeat.json` in the run directory and printed, and the process ends, so that torchrun's
agent can start all of them again.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from lorafit.errors import Problem, RunError
from lorafit.storage.atomic import write_file

COMPUTING, SHARING, BETWEEN = 0, 1, 2  # phases of a step, in order
_PHASES = ("computing its passes", "adding up gradients with the others", "between two steps")
_PATIENCE, _SECOND_LOOK = (
    0.6,
    0.2,
)  # parts of the time-out: until the others are looked at, and from then to the verdict


class Heartbeat:
    """A context manager around the steps of a run. Without a store, as for a process alone, it does nothing."""

    def __init__(
        self, store: dist.Store | None, rank: int, world_size: int, timeout: float, file: Path
    ) -> None:
        """`timeout` in seconds; `file` is where the verdict goes."""
        self._store, self._rank, self._world_size = store, rank, world_size
        self._timeout, self._file = timeout, file
        self._at, self._since, self._beats = (0, BETWEEN), time.monotonic(), 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def at(self, step: int, phase: int) -> None:
        """Training goes on: it is in `phase` of `step`."""
        self._at, self._since = (step, phase), time.monotonic()

    def __enter__(self) -> Heartbeat:
        self._since = time.monotonic()
        if self._store is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._store is not None:
            self._thread.join()

    def _watch(self) -> None:
        assert self._store is not None
        try:
            self._beat(self._store)
            while not self._ended.wait(min(10.0, self._timeout / 20)):
                self._beat(self._store)
                if time.monotonic() - self._since < self._timeout * _PATIENCE:
                    continue
                before, where = self._look(self._store), self._at
                if self._ended.wait(self._timeout * _SECOND_LOOK) or self._at != where:
                    continue
                self._beat(self._store)
                self._judge(before, self._look(self._store))
        except (
            dist.DistError
        ):  # the store is gone, and with it the first rank or the agent: the collectives will say so
            return

    def _beat(self, store: dist.Store) -> None:
        self._beats += 1
        step, phase = self._at
        sign = {
            "beats": self._beats,
            "step": step,
            "phase": phase,
            "host": platform.node(),
            "process": os.getpid(),
        }
        store.set(f"beat/{self._rank}", json.dumps(sign))

    def _look(self, store: dist.Store) -> list[dict[str, Any] | None]:
        keys = [f"beat/{rank}" for rank in range(self._world_size)]
        return [json.loads(store.get(key)) if store.check([key]) else None for key in keys]

    def _judge(
        self, before: Sequence[Mapping[str, Any] | None], now: Sequence[Mapping[str, Any] | None]
    ) -> None:
        """Name the ranks that stand still and end the process; only one living rank speaks for all."""
        culprits = standing_still(before, now)
        living = [rank for rank in range(self._world_size) if rank == self._rank or now[rank] != before[rank]]
        if living and living[0] == self._rank:
            verdict = {
                "timeout": self._timeout,
                "stands_still": culprits,
                "ranks": [sign and {**sign, "phase": _PHASES[sign["phase"]]} for sign in now],
            }
            problems = [Problem(text, str(self._file)) for text in culprits.values()]
            if self._file.parent.is_dir():  # another host may have no such folder
                try:
                    write_file(self._file, json.dumps(verdict, indent=1) + "\n")
                except RunError as error:
                    problems.append(error.problems[0])
            print(*problems, sep="\n", file=sys.stderr, flush=True)
        os._exit(1)


def standing_still(
    before: Sequence[Mapping[str, Any] | None], now: Sequence[Mapping[str, Any] | None]
) -> dict[int, str]:
    """By rank, what is wrong with those that hold up the others, from two looks at all signs of life.

    Those whose sign has not changed are frozen or gone. Where all live, it is those that are furthest behind.
    """
    silent = [rank for rank, (old, new) in enumerate(zip(before, now, strict=True)) if old == new]
    if silent:
        return {rank: f"rank {rank} {_name(now[rank])} gives no sign of life" for rank in silent}
    places = [(sign["step"], sign["phase"]) for sign in now if sign is not None]
    last = [rank for rank, place in enumerate(places) if place == min(places)]
    return {rank: f"rank {rank} {_name(now[rank])} stands still, the others wait for it" for rank in last}


def _name(sign: Mapping[str, Any] | None) -> str:
    if sign is None:
        return "(not heard of yet)"
    return f"(process {sign['process']} on {sign['host']}, step {sign['step']}, {_PHASES[sign['phase']]})"
