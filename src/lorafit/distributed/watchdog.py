"""The heartbeat of every rank, and a report of which rank is stuck, and where, when a step does not end.

A collective that waits for a lost process reports only a time-out. Here each rank has a thread that writes the
position of its training to torch's key-value store. If that does not change for most of the time-out, the thread
compares all ranks: a rank without a heartbeat is frozen or lost, a rank behind the others is stuck. The report goes to
`heartbeat.json` in the run directory and to stderr. The process then ends, so that torchrun's agent can restart all.
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
from typing import Any

import torch.distributed as dist

from lorafit.distributed.ranks import Ranks
from lorafit.errors import Problem, RunError
from lorafit.storage.atomic import write_file

COMPUTING, SHARING, BETWEEN = 0, 1, 2  # phases of a step, in order
_PHASES = ("computing its passes", "all-reducing gradients", "between two steps")
# parts of the time-out: until the ranks are compared, and from then until they are compared again
_PATIENCE, _SECOND_LOOK = 0.6, 0.2


class Heartbeat:
    """A context manager around the steps of each phase of a run. Without a store (a single process) it does nothing."""

    def __init__(self, ranks: Ranks, timeout: float, file: Path) -> None:
        """`timeout` in seconds; the report goes to `file`."""
        self._store, self._rank, self._world_size = ranks.store, ranks.rank, ranks.world_size
        self._timeout, self._file = timeout, file
        self._at, self._since, self._beats = (0, BETWEEN), time.monotonic(), 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def at(self, step: int, phase: int) -> None:
        """Training has reached `phase` of `step`."""
        self._at, self._since = (step, phase), time.monotonic()

    def __enter__(self) -> Heartbeat:
        self._since = time.monotonic()
        if self._store is not None:
            self._ended.clear()
            self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
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
        except dist.DistError:  # the store is lost with rank 0 or the agent: the collectives report that
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
        """Report the ranks that are stuck and end the process; the lowest rank that responds reports for all."""
        culprits = standing_still(before, now)
        living = [rank for rank in range(self._world_size) if rank == self._rank or now[rank] != before[rank]]
        if living and living[0] == self._rank:
            verdict = {
                "timeout": self._timeout,
                "stands_still": culprits,
                "ranks": [sign and {**sign, "phase": _PHASES[sign["phase"]]} for sign in now],
            }
            problems = [Problem(text, str(self._file)) for text in culprits.values()]
            if self._file.parent.is_dir():  # a rank on another host may have no such folder
                try:
                    write_file(self._file, json.dumps(verdict, indent=1) + "\n")
                except RunError as error:
                    problems.append(error.problems[0])
            print(*problems, sep="\n", file=sys.stderr, flush=True)
        os._exit(1)


def standing_still(
    before: Sequence[Mapping[str, Any] | None], now: Sequence[Mapping[str, Any] | None]
) -> dict[int, str]:
    """The stuck ranks and what is wrong with each, from two readings of all heartbeats.

    A rank whose heartbeat has not changed is frozen or lost. If all have changed, those furthest behind are stuck.
    """
    silent = [rank for rank, (old, new) in enumerate(zip(before, now, strict=True)) if old == new]
    if silent:
        return {rank: f"rank {rank} {_name(now[rank])} does not respond" for rank in silent}
    positions = [(sign["step"], sign["phase"]) for sign in now if sign is not None]
    last = [rank for rank, position in enumerate(positions) if position == min(positions)]
    return {rank: f"rank {rank} {_name(now[rank])} is stuck; the other ranks wait for it" for rank in last}


def _name(sign: Mapping[str, Any] | None) -> str:
    if sign is None:
        return "(no heartbeat yet)"
    return f"(process {sign['process']} on {sign['host']}, step {sign['step']}, {_PHASES[sign['phase']]})"
