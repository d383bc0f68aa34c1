"""R7: a run belongs to one process, whatever people and programs do to its folder while it trains."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.crash.server import Servers
from tests.crash.trial import Tally
from tests.runs import tiny_settings
from tests.waiting import HANGS, until

from lorafit.config.load import load_config
from lorafit.errors import LorafitError
from lorafit.observe.events import Event, Saved
from lorafit.observe.metrics_file import Record
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import read_facts, verify_folder
from lorafit.training import loop
from lorafit.training import run as training_run
from lorafit.training.checkpoint import read_state

SLOTS = 3
MOVED = "the run directory was moved or replaced"
FOLDER_ACTIONS = ("remove", "move", "move back", "copy over", "symlink", "remove lock")
PROCESS_ACTIONS = ("start", "resume", "step", "step", "step", "kill")
SETTINGS = ("train.max_steps=60", "train.save_every=1", "train.keep=1", "data.holdout=0", "run.check=none")


def take_folders_away(work: Path, servers: Servers, sequences: int, seed: int = 0) -> Tally:
    """Random sequences of starts, kills and changes of the folder by up to three processes on one path."""
    tally = Tally()
    words = tiny_settings(work / "material", *SETTINGS)

    def trial(number: int) -> tuple[str, Place, list[str]]:
        draw = random.Random(f"{seed}-{number}")
        kinds = [(action, 0) for action in FOLDER_ACTIONS]
        kinds += [(action, slot) for action in PROCESS_ACTIONS for slot in range(SLOTS)]
        actions = [("start", 0), ("step", 0), ("step", 0), *draw.choices(kinds, k=draw.randint(4, 14))]
        folder = work / f"sequence-{number}"
        folder.mkdir()
        place, problems = Place(folder, words), []
        try:
            try:
                for action, slot in actions:
                    place.act(action, slot)
            finally:
                place.close()
            place.check()
        except AssertionError as error:
            problems.append(str(error))
        shutil.rmtree(folder, ignore_errors=True)
        return ", ".join(f"{action} {slot}" for action, slot in actions), place, problems

    for name, place, problems in servers.each(trial, range(sequences)):
        tally.add(name, *problems)
        tally.count("processes", place.num_started)
        tally.count("changes of the folder", place.num_changed)
        tally.count("runs that ended because of one", sum(MOVED in end for end in place.ends))
    return tally


def work(pipe: Connection, path: str, words: list[str], seed: int | None) -> None:
    """Train in this process, a step for each message; `seed` None resumes."""
    gradients = loop._gradients

    def paced(job: loop.TrainContext, state: Any, *rest: Any) -> Any:
        pipe.send(("ready", state.step))
        pipe.recv()
        return gradients(job, state, *rest)

    class Told(Record):
        def __call__(self, event: Event) -> None:
            super().__call__(event)
            if isinstance(event, Saved):
                pipe.send(("saved", event.step))

    loop._gradients = paced
    training_run.Record = Told  # type: ignore[misc]
    try:
        if seed is None:
            training_run.resume_run(path, quiet=True)
        else:
            config = load_config(None, [*words, f"run.output={path}", f"train.seed={seed}"])
            training_run.start_run(config, quiet=True)
        pipe.send(("ended", ""))
    except LorafitError as error:
        pipe.send(("ended", str(error)))


def _state(stat: Path) -> str:
    """The state of a process, as Linux writes it: T is stopped."""
    return stat.read_text().rpartition(")")[2].split()[0]


class Place:
    """One path, the processes that work on it, and what they reported as saved, by the inode of the run's folder."""

    def __init__(self, folder: Path, words: list[str]) -> None:
        self.folder, self.path, self.words = folder, folder / "run", words
        self.num_moved = self.num_started = self.num_changed = 0
        self.pipes: dict[int, Connection] = {}
        self.processes: dict[int, Any] = {}
        self.saved: dict[int, tuple[int, int]] = {}  # inode: newest step that was reported, seed
        self.ends: list[str] = []
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([__name__])

    def act(self, action: str, slot: int) -> None:
        if action in ("start", "resume"):
            if slot not in self.pipes:
                self._start(slot, action == "resume")
        elif action == "step":
            if slot in self.pipes:
                self.pipes[slot].send(None)
                self._listen(slot)
        elif action == "kill":
            self._kill(slot)
        else:
            self._change(action)

    def _start(self, slot: int, resumes: bool) -> None:
        self.num_started += 1
        here, there = self.context.Pipe()
        seed = None if resumes else self.num_started
        process = self.context.Process(
            target=work, args=(there, str(self.path), self.words, seed), daemon=True
        )
        process.start()
        there.close()
        self.pipes[slot], self.processes[slot] = here, process
        self._listen(slot)

    def _listen(self, slot: int) -> None:
        """Take the reports of a process until it is between two steps or has ended."""
        while True:
            assert self.pipes[slot].poll(HANGS), "a process hangs"
            kind, value = self.pipes[slot].recv()
            if kind == "saved":
                self.saved[self.path.stat().st_ino] = value, RunDirectory(self.path).config().train.seed
            elif kind == "ready":
                return
            else:
                self.ends.append(value)
                self.processes[slot].join(HANGS)
                assert self.processes.pop(slot).exitcode is not None, "a process does not end"
                self.pipes.pop(slot).close()
                return

    def _kill(self, slot: int) -> None:
        if slot in self.processes:
            process = self.processes.pop(slot)
            process.kill()
            process.join(HANGS)
            self.pipes.pop(slot).close()

    def _change(self, action: str) -> None:
        self.num_changed += 1
        aside = sorted(self.folder.glob("moved-*"))
        if action == "move back" and aside and not os.path.lexists(self.path):
            aside[-1].rename(self.path)
        if not self.path.exists():
            return
        if action == "remove lock":
            (self.path / "run.lock").unlink(missing_ok=True)
        elif action == "remove":
            if self.path.is_symlink():
                self.path.unlink()
            else:
                self.saved.pop(self.path.stat().st_ino, None)
                inode = self.path.stat().st_ino
                while self.path.exists():  # a commit may be under way, and makes files meanwhile
                    assert self.path.stat().st_ino == inode, "the folder was made anew"
                    shutil.rmtree(self.path, ignore_errors=True)
        elif action in ("move", "copy over", "symlink") and not self.path.is_symlink():
            self.num_moved += 1
            moved = self.folder / f"moved-{self.num_moved:03d}"
            with self._paused() if action == "symlink" else contextlib.nullcontext():
                self.path.rename(moved)
                if action == "symlink":
                    self.path.symlink_to(moved)
            if action == "copy over":
                with contextlib.suppress(shutil.Error):  # a commit may be under way
                    shutil.copytree(moved, self.path, ignore=shutil.ignore_patterns(".staging-*"))

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        """Stop all processes in the block: a save may be under way, and must not see half of a change."""
        stats = [Path(f"/proc/{process.pid}/stat") for process in self.processes.values()]
        for process in self.processes.values():
            os.kill(process.pid, signal.SIGSTOP)
        try:
            until(lambda: all(not stat.exists() or _state(stat) == "T" for stat in stats))
            yield
        finally:
            for process in self.processes.values():
                os.kill(process.pid, signal.SIGCONT)

    def close(self) -> None:
        for slot in range(SLOTS):
            self._kill(slot)

    def check(self) -> None:
        """What was reported as saved is there, and each folder holds one run."""
        folders = {path.stat().st_ino: path for path in self.folder.glob("*") if path.is_dir()}
        for inode, (step, seed) in self.saved.items():
            checkpoint = RunDirectory(folders[inode]).checkpoint(step)
            assert verify_folder(checkpoint) == [], checkpoint
            assert read_state(checkpoint).step == step
            assert read_facts(checkpoint)["config"]["train.seed"] == seed
        for path in folders.values():
            run = RunDirectory(path)
            whole = [step for step in run.saved_steps() if not verify_folder(run.checkpoint(step))]
            seeds = {read_facts(run.checkpoint(step))["config"]["train.seed"] for step in whole}
            if run.saved_steps():
                assert run.config_file.exists(), "a folder was made anew"
                assert seeds <= {run.config().train.seed}, "a folder holds two runs"
