"""Writes checkpoints during training: a thread commits a snapshot while the next steps run."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from lorafit.observe.events import Message, Observer, Saved
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import commit_files, make_subfolder, run_error, sync
from lorafit.training import pace
from lorafit.training.checkpoint import TrainState

_left: list[threading.Thread] = []  # commits that a run did not wait for


class AsyncCheckpointWriter:
    """Commits one snapshot at a time. A step waits for the disk only when two saves meet.

    The thread only writes. What follows a commit (the event, removal of older checkpoints) happens in `wait`, which
    the loop calls between steps. A context manager: its exit waits for a commit in progress, unless the user stops
    the run at once; then an orphan may stay, which the next start removes.
    """

    def __init__(self, run: RunDirectory, keep: int, facts: Mapping[str, Any], observe: Observer) -> None:
        self._run, self._keep, self._facts, self._observe = run, keep, facts, observe
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saved: Saved | None = None
        self.seconds = 0.0  # what the last commit took

    def save(self, state: TrainState, files: Mapping[str, bytes], reason: str) -> None:
        """Start to commit `files`, the snapshot of `state`. Raises RunError where the commit before failed."""
        self.wait(block=True)
        folder = self._run.checkpoint(state.step)
        self._saved = Saved(state.step, str(folder), reason)
        facts = {"step": state.step, "best_step": state.best_step, **self._facts}
        (lock, check), appended = self._run.keep_locked(), (self._run.metrics_file, self._run.visits_file)
        hint = "free space or repair the disk, then `lorafit train --resume` resumes from the last checkpoint"

        def commit() -> None:
            started = pace.clock()
            try:
                with lock:  # the thread may outlive its run, where Python continues after a Ctrl-C
                    check()
                    with run_error("cannot save", folder, sum(map(len, files.values())), hint):
                        make_subfolder(folder.parent)
                    for file in appended:  # what they have of the saved steps must be on disk too
                        if file.exists():
                            with run_error("cannot save", file, file.stat().st_size, hint):
                                sync(file)
                    commit_files(folder, files, facts, check)
                self.seconds = pace.clock() - started
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=commit, name="save", daemon=True)
        self._thread.start()

    def wait(self, *, block: bool) -> None:
        """Complete a commit that has ended. Raises its RunError, with earlier checkpoints unchanged."""
        if self._thread is None or (self._thread.is_alive() and not block):
            return
        self._thread.join()
        self._thread, saved = None, self._saved
        if self._error is not None:
            error, self._error = self._error, None
            self._run.check_held()  # where the run was moved, that is the reason
            raise error
        assert saved is not None
        self._observe(saved)
        try:
            self._run.rotate(self._keep)
        except OSError as error:
            self._observe(Message(f"older checkpoints stay: {error.strerror or error}", "warning"))

    def __enter__(self) -> AsyncCheckpointWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._thread is None:
            return
        if isinstance(error, KeyboardInterrupt):
            _left.append(self._thread)
        else:
            self._thread.join()


def wait_for_left() -> None:
    """Wait for commits of runs that were stopped at once in this process, as in a notebook."""
    while _left:
        _left.pop().join()
