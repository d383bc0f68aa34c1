"""Locks between processes: one that fails at once, and one that waits."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lorafit.errors import RunError
from lorafit.storage.atomic import BLOCK, identity, run_error
from lorafit.storage.safe_read import open_no_follow, read_text

CLAIM = ".holder"  # the suffix of the file beside a lock where the file system has no locks
MAX_CLAIM = 1000


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
def exclusive_lock(path: Path) -> Iterator[None]:
    """Wait until no other process is in a block of the file `path`. Where files cannot be locked, do not wait."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(stack.enter_context(path.open("ab")), fcntl.LOCK_EX)
        yield


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
