"""Locks between processes: one that fails at once, and one that waits."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lorafit.errors import RunError
from lorafit.storage.atomic import BLOCK, run_error
from lorafit.storage.safe_read import open_no_follow, read_text

CLAIM = ".holder"  # the suffix of the file beside a lock where the file system has no locks
MAX_CLAIM = 1000


@contextlib.contextmanager
def lock(path: Path) -> Iterator[BinaryIO | None]:
    """Lock the file `path` for this process. The operating system releases it when the process ends.

    Yields the open file: a duplicate of its descriptor holds the lock as well, until it is closed. Yields None where
    the system or the file system has no locks: a file beside `path` names the process then. Raises RunError when
    another living process holds the lock.
    """
    with run_error("cannot write here", path.parent, BLOCK):
        file = open_no_follow(path, "ab+")
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _is_held(path, file.read(32).decode(errors="replace").strip()) from None
        except (ImportError, OSError):  # Windows, or a network file system
            with _claimed(path):
                yield None
            return
        with contextlib.suppress(OSError):  # the pid is only informative, so a full disk is no error here
            file.truncate(0)
            file.write(str(os.getpid()).encode())
        yield file


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
def _claimed(path: Path) -> Iterator[None]:
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
            raise _is_held(path, f"{holder}if there is none any more, remove {claim}") from None
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


def _is_held(path: Path, holder: str) -> RunError:
    return RunError(
        "another process is writing this run" + (f" (process {holder})" if holder else ""),
        place=str(path.parent),
        hint="wait for it, stop it, or give another --output",
    )
