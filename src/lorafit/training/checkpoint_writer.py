"""Checkpoints are written beside training: a thread commits a snapshot while the next steps run."""

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

    The thread only writes; what follows from a commit (saying so, dropping older checkpoints) happens in
    `wait`, which the loop calls between steps. A context manager: on leaving, a commit under way is waited
    for, unless the user wants to stop at once; then it leaves an orphan that the next start removes.
    """

    def __init__(self, run: RunDirectory, keep: int, facts: Mapping[str, Any], observe: Observer) -> None:
        self._run, self._keep, self._facts, self._observe = run, keep, facts, observe
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saved: Saved | None = None

    def save(self, taken: Snapshot, reason: str) -> None:
        """Begin to commit `taken`. Raises RunError when the commit before failed."""
        self.wait(block=True)
        folder = self._run.checkpoint(taken.step)
        self._saved = Saved(taken.step, str(folder), reason)
        work = (taken, self._run.keep_locked())
        self._thread = threading.Thread(target=self._commit, args=work, name="save", daemon=True)
        self._thread.start()

    def wait(self, *, block: bool) -> None:
        """Take note of a commit that has ended. Raises its RunError, with earlier checkpoints untouched."""
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
            with lock:  # the thread may outlive the run that began it, where Python goes on after a Ctrl-C
                self._sync_metrics()
                save_checkpoint(self._run.checkpoint(taken.step), taken, self._facts)
        except BaseException as error:
            self._error = error

    def _sync_metrics(self) -> None:
        """Make what is known of the steps before as durable as they are."""
        num_bytes = 0
        try:
            if self._run.metrics_file.exists():
                num_bytes = self._run.metrics_file.stat().st_size
                sync(self._run.metrics_file)
        except OSError as error:
            raise RunError(
                f"cannot save: {error.strerror or error} ({num_bytes:,} bytes are needed)",
                place=str(self._run.metrics_file),
                hint="free space or fix the disk, then `lorafit train --resume` goes on from the last checkpoint",
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
    """Wait for commits of runs that were stopped at once in this process, as in a notebook that goes on with them."""
    while _left:
        _left.pop().join()
