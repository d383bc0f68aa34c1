"""Commands that the studio starts, each a process of its own that outlives it, and the queue of runs.

A job is a JSON file in lorafit's cache with its log beside it. None is read from the folder of the runs: a folder may
come from somebody else, and what a job says is started.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lorafit.errors import RunError
from lorafit.redact import printable, redact, shell
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import run_error, write_file
from lorafit.storage.cache_dir import cache_folder
from lorafit.storage.locks import exclusive_lock, is_locked
from lorafit.storage.safe_read import read_json, read_text

State = Literal["queued", "running", "done", "failed", "ended"]
OVER = ("done", "failed", "ended")
STOPPED = (130, -signal.SIGINT, -signal.SIGTERM)  # exit codes after a request to stop
KEPT = 50  # jobs that are over
MOST_LOG = 16_000  # characters of a log that a page shows
_MAX_JOB = 100_000
_SECRETS = ("LORAFIT_STUDIO_TOKEN",)  # what a process that the studio starts does not get


@dataclass(frozen=True, slots=True)
class Job:
    """One command: `words` after `lorafit`. `born` is the start of its process as the system has it.

    `ended` is the state of one that somebody stopped, and of a process whose studio has ended: its exit code is not
    known.
    """

    id: str
    words: tuple[str, ...]
    folder: str  # where it runs
    at: float  # seconds since 1970
    output: str = ""  # the run directory that it makes or reads
    state: State = "queued"
    pid: int = 0
    born: float = 0.0
    code: int | None = None

    @property
    def command(self) -> str:
        """The command as one types it."""
        return shell("lorafit", *self.words)

    @property
    def is_over(self) -> bool:
        """Whether its process has ended."""
        return self.state in OVER

    @property
    def trains(self) -> bool:
        """Whether it is a training: one of them runs at a time from the queue."""
        return self.words[0] == "train"

    @property
    def recipe(self) -> str:
        """The recipe file of a training, "" where it resumes one."""
        return self.words[1] if self.trains and len(self.words) == 2 else ""


class Jobs:
    """The jobs of the studios of one folder, by files. Safe between threads and processes."""

    def __init__(self, folder: Path) -> None:
        digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
        self.path = cache_folder("studio") / digest
        self.path.mkdir(mode=0o700, exist_ok=True)
        self._lock = threading.RLock()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._jobs: dict[str, Job] = {}
        self._files: dict[str, tuple[int, int]] = {}
        self._advanced: dict[str, Job] = {}  # as they were after the last `advance`

    def listed(self) -> list[Job]:
        """All jobs, newest first."""
        with self._lock:
            self._refresh()
            return sorted(self._jobs.values(), key=lambda job: (job.at, job.id), reverse=True)

    def job(self, name: str) -> Job:
        """The job with an id. Raises RunError."""
        with self._lock:
            self._refresh()
            if name not in self._jobs:
                raise RunError("there is no such job")
            return self._jobs[name]

    def start(self, words: Sequence[str], *, output: str = "", waits: bool = False) -> Job:
        """Start a command, or with `waits` put it at the end of the queue. Raises RunError."""
        job = Job(secrets.token_hex(8), tuple(words), str(Path.cwd()), time.time(), output)
        with self._sole():
            self._remember(job)
            return job if waits else self._spawn(job)

    def was_replaced(self, job: Job) -> bool:
        """Whether a later command has started a new run in the folder that a failed one was to make."""
        later = [one for one in self.listed() if one.at > job.at and one.output == job.output]
        return job.state == "failed" and any(one.recipe for one in later)

    def log(self, job: Job) -> str:
        """The end of what a job has printed, without secrets and escape sequences."""
        try:
            with self._log_file(job).open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - MOST_LOG))
                text = file.read().decode(errors="replace")
        except OSError:
            return ""
        return redact(printable(text.replace("\r\n", "\n").replace("\r", "\n")))

    def advance(self) -> bool:
        """Note which processes have ended, and start the next of the queue; whether a job has changed since."""
        with self._lock:
            self._refresh()
            if self._ended() or self._next():
                with self._sole():
                    for job, code in self._ended():
                        process = self._processes.pop(job.id, None)
                        is_stopped = process is None or code in STOPPED
                        state: State = "ended" if is_stopped else "failed" if code else "done"
                        self._remember(replace(job, state=state, code=code))
                    if following := self._next():
                        with suppress(RunError):
                            self._spawn(following)
            before, self._advanced = self._advanced, dict(self._jobs)
            return before != self._advanced

    def _ended(self) -> list[tuple[Job, int | None]]:
        """The jobs whose process has ended since, each with its exit code where the process is one of this studio."""
        codes = {name: process.poll() for name, process in self._processes.items()}
        return [
            (job, codes.get(job.id))
            for job in self._jobs.values()
            if codes.get(job.id) is not None or (job.state == "running" and not self._lives(job))
        ]

    def _next(self) -> Job | None:
        """The first of the queue, where no training runs."""
        queued = [job for job in self._jobs.values() if job.state == "queued"]
        is_busy = any(job.state == "running" and job.trains for job in self._jobs.values())
        return None if is_busy else min(queued, key=lambda job: job.at, default=None)

    def stop(self, job: Job) -> None:
        """End a job: a run saves first. One that waits leaves the queue."""
        with self._sole():
            job = self._jobs.get(job.id, job)
            if job.state == "queued":
                self._remember(replace(job, state="ended"))
            elif job.state == "running" and self._lives(job):
                with suppress(OSError):
                    os.killpg(job.pid, signal.SIGTERM)

    def forget(self, job: Job) -> None:
        """Remove a job that is over from the list, with its log."""
        with self._sole():
            if self._jobs[job.id].is_over:
                self._forget(job)

    def _forget(self, job: Job) -> None:
        del self._jobs[job.id]
        for file in (self._file(job), self._log_file(job)):
            file.unlink(missing_ok=True)

    @contextmanager
    def _sole(self) -> Iterator[None]:
        """No other studio changes a job meanwhile, and what it has changed before is known. Raises RunError."""
        with (
            self._lock,
            run_error("cannot write the jobs", self.path),
            exclusive_lock(self.path / "lock", lambda holder: None),
        ):
            self._refresh()
            yield

    def _refresh(self) -> None:
        """Read the jobs that have changed: another studio may have changed them."""
        files = {}
        with suppress(OSError), os.scandir(self.path) as entries:
            for entry in entries:
                if entry.name.endswith(".json"):
                    with suppress(OSError):
                        status = entry.stat(follow_symlinks=False)
                        files[entry.name] = (status.st_ino, status.st_mtime_ns)
        if files != self._files:
            same = {name for name, sign in files.items() if self._files.get(name) == sign}
            read = [self._read(self.path / name) for name in files.keys() - same]
            kept = [job for job in self._jobs.values() if f"{job.id}.json" in same]
            self._jobs, self._files = {job.id: job for job in [*kept, *read] if job}, files

    def tie(self, pid: int) -> None:
        """Note that a process must not outlive this studio: where this one is killed, the next one ends it."""
        pair = {"studio": (os.getpid(), _born(os.getpid())), "process": (pid, _born(pid))}
        write_file(self.path / f"{pid}.tied", json.dumps(pair) + "\n")

    def end_left(self) -> None:
        """End the processes that a killed studio of this folder has left."""
        for file in self.path.glob("*.tied"):
            with suppress(OSError, ValueError, TypeError, KeyError):
                pair = read_json(file, _MAX_JOB)
                (studio, began), (pid, born) = pair["studio"], pair["process"]
                if _born(studio) != began:
                    file.unlink()
                    if _born(pid) == born > 0:
                        os.kill(pid, signal.SIGTERM)

    def _spawn(self, job: Job) -> Job:
        env = {name: value for name, value in os.environ.items() if name not in _SECRETS}
        try:
            with self._log_file(job).open("wb") as log:
                process = subprocess.Popen(  # noqa: S603 (lorafit itself, no shell)
                    [sys.executable, "-m", "lorafit", *job.words],
                    cwd=job.folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # neither the end of the studio nor its Ctrl-C reaches it
                    env={**env, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"},
                )
        except OSError as error:
            self._remember(replace(job, state="failed"))
            raise RunError(f"cannot start the command: {error.strerror or error}") from None
        self._processes[job.id] = process
        job = replace(job, state="running", pid=process.pid, born=_born(process.pid))
        self._remember(job)
        return job

    def _lives(self, job: Job) -> bool:
        process = self._processes.get(job.id)
        if process is not None:
            return process.poll() is None
        return job.pid > 0 and job.born > 0 and _born(job.pid) == job.born

    def _remember(self, job: Job) -> None:
        self._jobs[job.id] = job
        write_file(self._file(job), json.dumps(asdict(job)) + "\n")
        over = sorted(
            (one for one in self._jobs.values() if one.is_over), key=lambda one: one.at, reverse=True
        )
        for old in over[KEPT:]:
            self._forget(old)

    def _file(self, job: Job) -> Path:
        return self.path / f"{job.id}.json"

    def _log_file(self, job: Job) -> Path:
        return self.path / f"{job.id}.log"

    def _read(self, path: Path) -> Job | None:
        try:
            value: dict[str, Any] = read_json(path, _MAX_JOB)
            job = Job(**{**value, "words": tuple(value["words"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return job if job.id == path.stem and job.words else None


def stop_run(run: RunDirectory) -> None:
    """Ask the process that trains `run` to save and end. Raises RunError where none does, or it is not ours."""
    import psutil

    if not is_locked(run.lock_file):
        raise RunError("no process trains this run", place=str(run.path))
    try:
        pid = int(read_text(run.lock_file, 32))
        process = psutil.Process(pid)
        if "lorafit" not in " ".join(process.cmdline()):
            raise RunError("the process that the run names is not lorafit", place=str(run.lock_file))
        process.send_signal(signal.SIGTERM)
    except (OSError, ValueError, psutil.Error):
        hint = "stop it where it was started, with Ctrl-C"
        raise RunError("the process of the run cannot be reached", place=str(run.path), hint=hint) from None


def _born(pid: int) -> float:
    """The start of a process as the system has it, 0.0 where there is none (or only its exit code is left)."""
    import psutil

    try:
        process = psutil.Process(pid)
        return 0.0 if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return 0.0
