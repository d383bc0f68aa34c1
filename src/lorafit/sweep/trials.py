"""The trials of a sweep: runs that differ in some keys, in one process or several; a finished one is not repeated.

The folder holds `sweep.json`, written first, and a run directory for each trial. The process that trains a trial holds
its lock, so any number of processes, on any number of machines that see the folder, share the trials of one sweep.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.config.load import with_absolute_paths
from lorafit.config.schema import Config
from lorafit.distributed.ranks import num_cores
from lorafit.errors import LorafitError, RunError
from lorafit.model.build import BaseModelCache
from lorafit.observe.progress import progress
from lorafit.observe.run_summary import RunState
from lorafit.redact import shell
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import is_orphan, make_folder, write_file
from lorafit.storage.locks import CLAIM, Held, lock
from lorafit.sweep.space import Point
from lorafit.training.run import resume_run, start_run

_PLAN, _LOCK = "sweep.json", "sweep.lock"
GOES_ON = "interrupted; the same command goes on"


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of a sweep: its directory, and the values that it has of what varies."""

    run: RunDirectory
    point: Point
    config: Config

    @property
    def name(self) -> str:
        return self.run.path.name

    @property
    def title(self) -> str:
        """Its name and what varies: `trial-001  lora.rank=4`."""
        return f"{self.name}  {', '.join(f'{key}={value}' for key, value in self.point.items())}"

    @property
    def finished(self) -> bool:
        """Whether the run is complete and its adapter is whole."""
        return RunState.of(self.run).is_complete and self.run.has_adapter()

    @property
    def lock_file(self) -> Path:
        return self.run.path.with_name(f".{self.name}.lock")

    @property
    def error_file(self) -> Path:
        return self.run.path.with_name(f"{self.name}.error.txt")


def plan_sweep(folder: Path, trials: Sequence[tuple[Point, Config]]) -> list[Trial]:
    """The trials of the sweep in `folder`, which is made where it does not exist.

    Raises RunError where the folder holds anything but a sweep of the same trials.
    """
    plan = [
        {"varies": point, "config": with_absolute_paths(config).model_dump(mode="json", exclude_unset=True)}
        for point, config in trials
    ]
    file = folder / _PLAN
    _refuse_foreign(folder)
    try:
        make_folder(folder)
    except OSError as error:
        raise RunError(f"cannot make the folder: {error.strerror or error}", place=str(folder)) from None
    with lock(folder / _LOCK, "sweep"):
        _refuse_foreign(folder)
        if not file.exists():
            write_file(file, json.dumps(plan, indent=1) + "\n")
        elif _read(file) != plan:
            raise RunError(
                f"`{folder}` holds a sweep of other trials",
                hint=f"continue it: `{shell('lorafit', 'sweep', '--resume', folder)}`, or give another --output",
            )
        return open_sweep(folder)


def _refuse_foreign(folder: Path) -> None:
    """Raise RunError where `folder` is not empty and holds no sweep; what a killed start left does not count."""
    if folder.exists() and not (folder / _PLAN).exists():
        own = (_LOCK, _LOCK + CLAIM)
        if not folder.is_dir() or any(
            path.name not in own and not is_orphan(path.name) for path in folder.iterdir()
        ):
            raise RunError(f"`{folder}` is not empty", hint="give an --output that does not exist yet")


def open_sweep(folder: Path) -> list[Trial]:
    """The trials of a sweep that exists. Raises RunError where there is none."""
    file = folder / _PLAN
    if not file.is_file():
        raise RunError(
            f"`{folder}` is no sweep: it has no {_PLAN}", hint="`lorafit sweep --vary ...` begins one"
        )
    width = len(str(len(plan := _read(file))))
    trials = []
    for number, entry in enumerate(plan, 1):
        run = RunDirectory(folder / f"trial-{number:0{max(3, width)}d}")
        values = {**entry["config"], "run": {**entry["config"].get("run", {}), "output": str(run.path)}}
        trials.append(Trial(run, dict(entry["varies"]), Config.model_validate(values)))
    return trials


def work(trials: Sequence[Trial], announce: Callable[[Trial, str], None], *, quiet: bool = False) -> bool:
    """Train the trials that are not finished and that no other process trains; False where one was interrupted.

    A trial is one line with its progress. `announce` gets the trial and what happens to it; where `quiet`, also that it
    begins. A trial that fails leaves its error beside its directory and does not stop the others. Runs of the same
    base load it once. Raises RunError where the sweep is moved or replaced.
    """
    base = BaseModelCache()
    if not trials:
        return True
    sweep = Held(trials[0].run.path.with_name(_PLAN), "sweep")
    for trial in trials:
        with ExitStack() as stack:
            sweep.check()
            try:
                stack.enter_context(lock(trial.lock_file))
            except RunError:  # another process trains it
                sweep.check()
                continue
            if trial.finished:
                continue
            begun = trial.run.config_file.exists()
            if quiet:
                announce(trial, "continues" if begun else "begins")
            try:
                with progress(trial.title, quiet=quiet):
                    if begun:
                        result = resume_run(trial.run.path, quiet=True, base=base)
                    else:
                        result = start_run(trial.config, quiet=True, base=base)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"{trial.title}  {GOES_ON}") from None
            except LorafitError as error:
                sweep.check()
                write_file(trial.error_file, f"{error}\n")
                announce(trial, f"failed: {error.problems[0].message}")
                continue
            sweep.check()
            trial.error_file.unlink(missing_ok=True)
            if not result.finished:
                announce(trial, GOES_ON)
                return False
    return True


def work_beside_each_other(folder: Path, num_processes: int) -> int:
    """Let several processes share the trials and the cores; returns the highest exit code."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, num_cores() // num_processes))
    command = [sys.executable, "-m", "lorafit", "sweep", "--resume", str(folder), "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)  # noqa: S603 (this program)
        for _ in range(num_processes)
    ]
    try:
        return max(process.wait() for process in started)
    except KeyboardInterrupt:
        for process in started:
            process.terminate()
        return max(130, *(process.wait() for process in started))


def _read(file: Path) -> list[Mapping[str, Any]]:
    try:
        plan = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise RunError("the sweep cannot be read", place=str(file)) from None
    assert isinstance(plan, list)
    return plan
