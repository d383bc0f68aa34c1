"""Waits for a download: Ctrl-C ends them at once, and one for another process says for whom and has an end."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils.tqdm import tqdm

from lorafit.hub import DOWNLOAD
from lorafit.redact import logger_of
from lorafit.storage.locks import PATIENCE, WAITING_SECONDS

_LIBRARY = logging.getLogger(
    "huggingface_hub.utils._fixes"
)  # it reports each time that it waits for a lock of a file
logger = logger_of(__name__)


def interruptible(download: Callable[[type[tqdm]], str]) -> str:
    """What `download` returns, called with the class of its progress bars in a thread of its own.

    The library's own wait for its threads lasts until they end, also after Ctrl-C. Here an interruption is raised at
    once, and the threads end with the next piece that they receive.
    """
    done: Future[str] = Future()
    stopped = threading.Event()

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            if stopped.is_set():
                raise InterruptedError
            return bool(super().update(n))

    def run() -> None:
        try:
            done.set_result(download(Bar))
        except BaseException as error:
            done.set_exception(error)

    try:
        threading.Thread(target=run, name=DOWNLOAD, daemon=True).start()
        return done.result()
    except BaseException:
        stopped.set()
        raise


@contextlib.contextmanager
def watched_waits(storage: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Watch the waits of downloads to `storage`, a repository's folder in the cache, until the block ends.

    A wait raises TimeoutError when nothing in `storage` has changed for `patience` seconds.
    """
    watch, level, every = _Watch(storage, patience), _LIBRARY.level, constants.FILELOCK_LOG_EVERY_SECONDS
    constants.FILELOCK_LOG_EVERY_SECONDS = WAITING_SECONDS  # type: ignore[assignment]  # seconds, also parts of one
    _LIBRARY.addFilter(watch)
    _LIBRARY.setLevel(logging.INFO)
    try:
        yield
    finally:
        _LIBRARY.setLevel(level)
        _LIBRARY.removeFilter(watch)
        constants.FILELOCK_LOG_EVERY_SECONDS = every


class _Watch(logging.Filter):
    """Gets each report of a wait, and shows none of them."""

    def __init__(self, storage: Path, patience: float) -> None:
        super().__init__()
        self._storage, self._patience = storage, patience
        self._size, self._changed, self._is_said = -1, time.monotonic(), False

    def filter(self, record: logging.LogRecord) -> bool:
        if "Still waiting" not in record.msg:
            return record.levelno >= logging.WARNING
        size, now = self._size_now(), time.monotonic()
        if size != self._size:
            self._size, self._changed = size, now
        elif now - self._changed >= self._patience:
            raise TimeoutError(f"{self._holder()} holds its files, and gives no sign of life")
        if not self._is_said:
            self._is_said = True
            logger.warning("%s downloads the same files, and this process waits for it", self._holder())
        return False

    def _size_now(self) -> int:
        """The bytes of what is being downloaded."""
        total = 0
        with contextlib.suppress(OSError):
            total = sum(file.stat().st_size for file in (self._storage / "blobs").iterdir())
        return total

    def _holder(self) -> str:
        """The process that holds a lock of the repository, as Linux lists it."""
        locks = self._storage.parent / ".locks" / self._storage.name
        with contextlib.suppress(OSError, ValueError):
            inodes = {file.stat().st_ino for file in locks.iterdir()}
            for entry in Path("/proc/locks").read_text(encoding="ascii").splitlines():
                fields = entry.split()
                if (
                    fields[1] != "->"
                    and int(fields[5].rpartition(":")[2]) in inodes
                    and int(fields[4]) != os.getpid()
                ):
                    return f"process {fields[4]}"
        return "another process"
