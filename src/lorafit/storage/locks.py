"""Locks between processes: one that fails at once, and one that waits."""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from lorafit.errors import RunError
from lorafit.redact import redact, shell, without_secrets
from lorafit.storage.atomic import BLOCK, identity, run_error
from lorafit.storage.ownership import not_own
from lorafit.storage.safe_read import open_no_follow, read_text

CLAIM = ".holder"  # the suffix of the file beside a lock where the file system has no locks
MAX_CLAIM = 1000
WAITING_SECONDS = 2.0  # until a process reports which one it waits for
PATIENCE = 120.0  # seconds without a sign of life


class Held:
    """A file that this process holds, and the folder of it: both must stay at their path as long as it is held."""

    def __init__(self, path: Path, what: str, file: BinaryIO | None = None) -> None:
        """`what` is what the folder holds; `file` the open lock. Raises RunError where `path` is another file."""
        self._path, self._what, self._file = path, what, file
        self._identities = self._now()
        if file is not None and self._identities[1:] != (identity(os.fstat(file.fileno())),):
            raise self._moved()

    def check(self) -> None:
        """Raise RunError where the file or its folder was moved, removed or replaced. Two calls of stat."""
        if not self._identities or self._now() != self._identities:
            raise self._moved()

    def keep(self) -> contextlib.AbstractContextManager[object]:
        """A context that holds the lock until it ends, for a thread that outlives the block of `lock`."""
        return (
            contextlib.nullcontext() if self._file is None else os.fdopen(os.dup(self._file.fileno()), "rb")
        )

    def _now(self) -> tuple[tuple[int, int], ...]:
        try:
            return identity(self._path.parent.stat()), identity(self._path.lstat())
        except OSError:
            return ()

    def _moved(self) -> RunError:
        return RunError(
            f"the {self._what} directory was moved or replaced",
            place=str(self._path.parent),
            hint="what was saved is in the folder that was moved, and nothing in the one that is here now was changed",
        )


@contextlib.contextmanager
def lock(path: Path, what: str = "run") -> Iterator[Held]:
    """Lock the file `path` for this process. The operating system releases it when the process ends.

    Where the system or the file system has no locks, a file beside `path` names the process. Raises RunError when
    another living process holds the lock; `what` is what the folder holds.
    """
    with run_error("cannot write here", path.parent, BLOCK):
        file = open_no_follow(path, "ab+")
    with file:
        refuse_others(path.parent)
        refuse_others(path)
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _is_held(path, what, file.read(32).decode(errors="replace").strip()) from None
        except (ImportError, OSError):  # Windows, or a network file system
            with _claimed(path, what):
                yield Held(_claim_of(path), what)
            return
        held = Held(path, what, file)
        with contextlib.suppress(OSError):  # the pid is only informative, so a full disk is no error here
            file.truncate(0)
            file.write(str(os.getpid()).encode())
        yield held


@contextlib.contextmanager
def exclusive_lock(
    path: Path, waiting: Callable[[str], None], patience: float = PATIENCE
) -> Iterator[Callable[[], None]]:
    """Wait until no other process is in a block of the file `path`. Where files cannot be locked, do not wait.

    Yields a function to be called as a sign of life. `waiting` is called with the process that is waited for, after
    WAITING_SECONDS. Raises OSError where `path` is no plain file, and TimeoutError when that process gives no sign for
    `patience` seconds.
    """
    with open_no_follow(path, "ab+") as file:
        try:
            import fcntl
        except ImportError:  # Windows
            yield lambda: None
            return
        started = changed = time.monotonic()
        sign, is_said = os.fstat(file.fileno()).st_mtime_ns, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                now = time.monotonic()
            except OSError:  # a network file system
                break
            if (newest := os.fstat(file.fileno()).st_mtime_ns) != sign:
                sign, changed = newest, now
            if now - changed >= patience:
                raise TimeoutError(f"{_holder(file)} gives no sign of life")
            if not is_said and now - started >= WAITING_SECONDS:
                waiting(_holder(file))
                is_said = True
            time.sleep(0.05)
        with contextlib.suppress(OSError):  # the text is only informative
            file.truncate(0)
            command = redact(shlex.join([Path(sys.argv[0]).name, *without_secrets(sys.argv[1:])]))[:MAX_CLAIM]
            file.write(f"process {os.getpid()} since {datetime.now():%H:%M:%S}: {command}".encode())
        yield lambda: os.utime(file.fileno())


def _holder(file: BinaryIO) -> str:
    file.seek(0)
    return file.read(MAX_CLAIM).decode(errors="replace") or "another process"


def refuse_others(place: Path) -> None:
    """Raise RunError where another user has made a file or folder, or can write there."""
    if reason := not_own(place):
        command = shell("chmod", "go-w", place)
        own = f"`{command}`, if you trust what is in it" if "written" in reason else "run as its owner"
        raise RunError(f"`{place.name}` {reason}", place=str(place), hint=f"{own}, or give another --output")


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock `path`. Needs no right to write, and changes nothing."""
    try:
        import fcntl

        with open_no_follow(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):
        pass
    return _is_claimed(_claim_of(path))


@contextlib.contextmanager
def _claimed(path: Path, what: str) -> Iterator[None]:
    """Lock `path` by a file beside it that names this process and its machine.

    The claim of a dead process of this machine is replaced. Whether a process of another machine lives is unknown:
    RunError names the file to remove.
    """
    claim = _claim_of(path)
    with run_error("cannot write here", path.parent, BLOCK):
        try:
            if claim.exists() and not _is_claimed(claim):
                claim.unlink()
            with claim.open("x", encoding="utf-8") as file:
                file.write(f"{os.getpid()} on {platform.node()}")
        except FileExistsError:
            holder = ""
            with contextlib.suppress(OSError, ValueError):  # it is gone, or is no text
                holder = f"{read_text(claim, MAX_CLAIM)}; "
            raise _is_held(path, what, f"{holder}if there is none any more, remove {claim}") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            claim.unlink()


def _claim_of(path: Path) -> Path:
    return path.with_name(path.name + CLAIM)


def _is_claimed(claim: Path) -> bool:
    """Whether `claim` names a living process, or one about which nothing is known."""
    try:
        pid, _, machine = read_text(claim, MAX_CLAIM).partition(" on ")
        import psutil  # only where there is a claim: it takes longer to load than most commands need

        return machine != platform.node() or psutil.pid_exists(int(pid))
    except FileNotFoundError:
        return False
    except (OSError, ValueError, OverflowError):
        return True


def _is_held(path: Path, what: str, holder: str) -> RunError:
    return RunError(
        f"another process is writing this {what}" + (f" (process {holder})" if holder else ""),
        place=str(path.parent),
        hint="wait for it, stop it, or give another --output",
    )
