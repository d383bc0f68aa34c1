"""The folder of a studio: its runs by ids that are no paths, their notes, and the bin."""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path

from lorafit.errors import RunError
from lorafit.redact import visible
from lorafit.run_dir import RunDirectory, find_runs
from lorafit.storage.atomic import make_folder, run_error, write_file
from lorafit.storage.locks import is_locked
from lorafit.storage.safe_read import read_text

OWN = ".studio"
NOTE = "note.txt"
MOST_NOTE = 20_000  # characters


class Folder:
    """The runs below `path`. A page names one by a digest of its place, so that no request holds a path."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().resolve()
        self._runs: dict[str, RunDirectory] = {}

    def scan(self) -> dict[str, RunDirectory]:
        """The runs by id, newest first."""
        found = find_runs(self.path) if self.path.is_dir() else []
        self._runs = {self.id_of(run.path): run for run in found if OWN not in run.path.parts}
        return self._runs

    def run(self, name: str) -> RunDirectory:
        """The run with an id. Raises RunError where there is none."""
        run = self._runs.get(name) or self.scan().get(name)
        if run is None or not run.config_file.is_file():
            raise RunError("there is no such run in this folder", place=str(self.path))
        return run

    def known(self) -> dict[str, RunDirectory]:
        """The runs that the last scan found."""
        return self._runs

    def id_of(self, path: Path) -> str:
        """The id of the run at `path`."""
        return hashlib.sha256(os.fsencode(path)).hexdigest()[:16]

    def name_of(self, run: RunDirectory) -> str:
        """The name of a run for people: its path below the folder."""
        with suppress(ValueError):
            return visible(str(run.path.relative_to(self.path)))
        return visible(str(run.path))

    def check_free(self, run: RunDirectory) -> None:
        """Raise RunError where a run cannot go to the bin."""
        if is_locked(run.lock_file):
            raise RunError("the run is being trained", place=str(run.path), hint="stop it first")
        if run.path == self.path:
            raise RunError("the folder of the studio is this run itself", place=str(run.path))

    def bin(self, run: RunDirectory) -> Path:
        """Move a run that no process writes to the bin, below the folder; returns its new place. Raises RunError."""
        self.check_free(run)
        target = self.path / OWN / "bin" / f"{run.path.name}-{time.time_ns()}"
        with run_error("cannot move the run to the bin", run.path):
            make_folder(target.parent)
            run.path.rename(target)
        self.scan()
        return target


def note_of(run: RunDirectory) -> str:
    """The note that the user wrote about a run, "" for none."""
    with suppress(OSError, ValueError):
        return read_text(run.path / NOTE, 4 * MOST_NOTE)[:MOST_NOTE]
    return ""


def write_note(run: RunDirectory, text: str) -> None:
    """Write the note about a run. Raises RunError."""
    write_file(run.path / NOTE, text[:MOST_NOTE].replace("\r\n", "\n"))


def signs(run: RunDirectory) -> tuple[object, ...]:
    """What changes when a run does: the states of its files, and whether a process writes it."""
    found: list[object] = []
    files = (run.metrics_file, run.config_file, run.proof_file, run.path / NOTE, run.adapter)
    for file in files:
        try:
            status = os.lstat(file)
            found.append((status.st_ino, status.st_size, status.st_mtime_ns))
        except OSError:
            found.append(None)
    return (*found, is_locked(run.lock_file))
