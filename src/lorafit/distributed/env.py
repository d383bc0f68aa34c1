"""The rank of this process and the size of its group, as torchrun sets them in the environment."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lorafit.errors import Problem, RunError

# Whether this process is a command that makes one run: then the run's time begins with the process.
command = {"is_one_run": False}


@dataclass(frozen=True, slots=True)
class ProcessEnv:
    """A process among the `world_size` of a run; `local_*` count those of its own host.

    `launch` is the id of the rendezvous (torchrun's --rdzv-id), `restarts` how often its agent has restarted them.
    A single process is `ProcessEnv()`.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launch: str = ""
    restarts: int = 0

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> ProcessEnv:
        """The environment of this process: a single process unless both RANK and WORLD_SIZE are set.

        Raises RunError with every variable that is not a valid number.
        """
        if not {"RANK", "WORLD_SIZE"} <= environment.keys():
            return cls()
        wrong: list[Problem] = []

        def number(name: str, *, otherwise: str = "", least: int = 0) -> int:
            text = environment.get(name, otherwise)
            if text.isdecimal() and int(text) >= least:
                return int(text)
            hint = "the launcher sets it (torchrun); to run one process alone, unset RANK and WORLD_SIZE"
            wrong.append(Problem(f"{name}={text} is no whole number from {least}", "the environment", hint))
            return least

        env = cls(
            rank=number("RANK"),
            world_size=number("WORLD_SIZE", least=1),
            local_rank=number("LOCAL_RANK", otherwise="0"),
            local_world_size=number("LOCAL_WORLD_SIZE", otherwise="1", least=1),
            launch=environment.get("TORCHELASTIC_RUN_ID", ""),
            restarts=number("TORCHELASTIC_RESTART_COUNT", otherwise="0"),
        )
        if not wrong and env.rank >= env.world_size:
            wrong.append(Problem(f"RANK={env.rank} of WORLD_SIZE={env.world_size}", "the environment"))
        if wrong:
            raise RunError.of(wrong)
        if env.has_agent:
            _first_parent(os.getpid())
        return env

    @property
    def is_single_process(self) -> bool:
        """Whether the run has one process."""
        return self.world_size == 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes all files and messages."""
        return self.rank == 0

    @property
    def has_agent(self) -> bool:
        """Whether torchrun's agent restarts this process when it fails."""
        return bool(self.launch)

    @property
    def has_lost_agent(self) -> bool:
        """Whether torchrun's agent has ended before this process: then nobody restarts it or forwards signals."""
        return self.has_agent and os.getppid() != _first_parent(os.getpid())


@functools.cache
def _first_parent(process: int) -> int:
    """The parent of this process when it was first asked for; another one takes the place of one that ends."""
    return os.getppid()


def mark_no_restart(env: ProcessEnv, exit_code: int) -> None:
    """Write a marker that tells torchrun's restarts not to try again: the error is permanent.

    torchrun's agent restarts its workers for any failure, also for a wrong setting or a requested stop.
    """
    if env.has_agent:
        with contextlib.suppress(OSError, RuntimeError):  # then the restarts fail in the same way
            _marker(env).write_text(str(exit_code), encoding="ascii")


def exit_code_of_previous_attempt(env: ProcessEnv) -> int | None:
    """The exit code in the marker of an earlier start of this launch, None where there is none."""
    if not env.has_agent:
        return None
    try:
        marker = _marker(env)
        if env.restarts == 0:
            marker.unlink(missing_ok=True)
            return None
        return int(marker.read_text(encoding="ascii"))
    except (OSError, RuntimeError, ValueError):
        return None


def _marker(env: ProcessEnv) -> Path:
    """One file per agent, whose process is the parent of its workers."""
    from lorafit.storage.cache_dir import cache_folder  # only after a failure, so that `--help` stays fast

    name = re.sub(r"[^A-Za-z0-9]", "-", env.launch)[:80]
    return cache_folder("launches") / f"{name}-{os.getppid()}-{env.local_rank}"
