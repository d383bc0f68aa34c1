"""Writes checkpoints during training: a thread commits a snapshot while the next steps run."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from lorafit.errors import RunError
from lorafit.observe.events import Message, Observer, Saved
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import sync
from lorafit.training.checkpoint import Snapshot, save_checkpoint

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

    def save(self, taken: Snapshot, reason: str) -> None:
        """Start to commit `taken`. Raises RunError where the commit before failed."""
        self.wait(block=True)
        folder = self._run.checkpoint(taken.step)
        self._saved = Saved(taken.step, str(folder), reason)
        work = (taken, self._run.keep_locked())
        self._thread = threading.Thread(target=self._commit, args=work, name="save", daemon=True)
        self._thread.start()

    def wait(self, *, block: bool) -> None:
        """Complete a commit that has ended. Raises its RunError, with earlier checkpoints unchanged."""
        if self._thread is None or (self._thread.is_alive() and not block):
            return
        self._thread.join()
        self._thread, saved = None, self._saved
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        assert saved is not None
        self._observe(saved)
        try:
            self._run.rotate(self._keep)
        except OSError as error:
            self._observe(Message(f"older checkpoints stay: {error.strerror or error}", "warning"))

    def _commit(self, taken: Snapshot, lock: AbstractContextManager[object]) -> None:
        try:
            with lock:  # the thread may outlive its run, where Python goes on after a Ctrl-C
                self._sync_metrics()
                save_checkpoint(self._run.checkpoint(taken.step), taken, self._facts)
        except BaseException as error:
            self._error = error

    def _sync_metrics(self) -> None:
        """fsync the metrics, so that those of the saved steps are on disk too."""
        num_bytes = 0
        try:
            if self._run.metrics_file.exists():
                num_bytes = self._run.metrics_file.stat().st_size
                sync(self._run.metrics_file)
        except OSError as error:
            raise RunError(
                f"cannot save: {error.strerror or error} ({num_bytes:,} bytes are needed)",
                place=str(self._run.metrics_file),
                hint="free space or repair the disk, then `lorafit train --resume` resumes from the last checkpoint",
            ) from error

    def __enter__(self) -> AsyncCheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
