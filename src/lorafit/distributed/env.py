"""Which of a run's processes this one is: what torchrun and its like say in the environment, read in one place."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lorafit.errors import Problem, RunError


@dataclass(frozen=True, slots=True)
class ProcessEnv:
    """A process among the `world_size` of a run; `local_*` count those of its own host.

    `launch` names the rendezvous that brought them together (torchrun's --rdzv-id), `restarts` how often its agent
    has started them anew. A process by itself is `Place()`.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launch: str = ""
    restarts: int = 0

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> ProcessEnv:
        """This process's place: that of RANK and WORLD_SIZE where both are set, else alone.

        RunError names every variable that is no such number.
        """
        if not {"RANK", "WORLD_SIZE"} <= environment.keys():
            return cls()
        wrong: list[Problem] = []

        def number(name: str, *, otherwise: str = "", least: int = 0) -> int:
            said = environment.get(name, otherwise)
            if said.isdecimal() and int(said) >= least:
                return int(said)
            hint = "the launcher sets it (torchrun); to run one process alone, unset RANK and WORLD_SIZE"
            wrong.append(Problem(f"{name}={said} is no whole number from {least}", "the environment", hint))
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
        return env

    @property
    def is_single_process(self) -> bool:
        """Whether there is no other process."""
        return self.world_size == 1

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes and speaks."""
        return self.rank == 0

    @property
    def device_index(self) -> int | None:
        """Which of its host's devices is this process's; None where it is alone and may take any."""
        return None if self.is_single_process else self.local_rank

    @property
    def has_agent(self) -> bool:
        """Whether torchrun's agent watches over this process and starts it anew when it fails."""
        return bool(self.launch)


def mark_no_restart(env: ProcessEnv, exit_code: int) -> None:
    """Leave word for the restarts of this launch that they would only end in the same way.

    torchrun's agent starts its workers anew whatever made them end; that a setting is wrong, or that somebody asked
    the run to stop, does not change by that.
    """
    if env.has_agent:
        with contextlib.suppress(OSError, RuntimeError):  # then the restarts find out by themselves
            _word(env).write_text(str(exit_code), encoding="ascii")


def exit_code_of_previous_attempt(env: ProcessEnv) -> int | None:
    """The exit code that an earlier start of this launch ended with for good, None if there was none."""
    if not env.has_agent:
        return None
    try:
        word = _word(env)
        if env.restarts == 0:
            word.unlink(missing_ok=True)
            return None
        return int(word.read_text(encoding="ascii"))
    except (OSError, RuntimeError, ValueError):
        return None


def _word(env: ProcessEnv) -> Path:
    """One file for each agent: its process is the parent of its workers."""
    from lorafit.storage.cache_dir import cache_folder  # only where something failed: `--help` is quick

    name = re.sub(r"[^A-Za-z0-9]", "-", env.launch)[:80]
    return cache_folder("launches") / f"{name}-{os.getppid()}-{env.local_rank}"
