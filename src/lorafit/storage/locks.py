"""Locks between processes: one that refuses, and one that waits."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lorafit.errors import RunError
from lorafit.storage.atomic import BLOCK
from lorafit.storage.safe_read import open_no_follow, read_text

MAX_CLAIM = 1000


@contextlib.contextmanager
def lock(path: Path) -> Iterator[BinaryIO | None]:
    """Hold the file `path` for this process alone; the operating system frees it when the process ends.

    Yields the open file: a duplicate of its descriptor holds the lock as well, until it is closed. None where the
    system or the file system has no locks: then a file beside it says which process holds it. Raises RunError when
    another living process does.
    """
    try:
        file = open_no_follow(path, "ab+")
    except OSError as error:
        raise _cannot_write(path, error) from None
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _held(path, file.read(32).decode(errors="replace").strip()) from None
        except (ImportError, OSError):  # Windows, or a network file system
            with _claimed(path):
                yield None
            return
        with contextlib.suppress(OSError):  # who holds it is a courtesy: a full disk is met where it matters
            file.truncate(0)
            file.write(str(os.getpid()).encode())
        yield file


def _cannot_write(path: Path, error: OSError) -> RunError:
    reason = f"{error.strerror or error} ({BLOCK:,} bytes are needed)"
    return RunError(f"cannot write here: {reason}", place=str(path.parent))


def _held(path: Path, holder: str) -> RunError:
    return RunError(
        "another process is writing this run" + (f" (process {holder})" if holder else ""),
        place=str(path.parent),
        hint="wait for it, stop it, or give another --output",
    )


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[None]:
    """Hold `path` by a file beside it that names this process and its machine.

    What a dead process of this machine has left is taken over. Of another machine nothing is known: RunError says
    which file to remove.
    """
    claim, mine = _claim_of(path), f"{os.getpid()} on {platform.node()}"
    try:
        if claim.exists() and not _is_claimed(path):
            claim.unlink()
        with claim.open("x", encoding="utf-8") as file:
            file.write(mine)
    except FileExistsError:
        holder = ""
        with contextlib.suppress(OSError, ValueError):  # it may have gone by now, or be no text
            holder = f"{read_text(claim, MAX_CLAIM)}; "
        raise _held(path, f"{holder}if there is none any more, remove {claim}") from None
    except OSError as error:
        raise _cannot_write(path, error) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            claim.unlink()


def _claim_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.holder")


def _is_claimed(path: Path) -> bool:
    """Whether the file beside `path` names a process that lives, or one of which that cannot be known."""
    try:
        number, _, machine = read_text(_claim_of(path), MAX_CLAIM).partition(" on ")
        if machine != platform.node():
            return True
        if os.name == "nt":
            import psutil

            return bool(psutil.pid_exists(int(number)))
        os.kill(int(number), 0)
    except (FileNotFoundError, ProcessLookupError):
        return False
    except (OSError, ValueError, OverflowError):
        return True
    return True


@contextlib.contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Wait, as long as it takes, until no other living process is in the block of the file `path`.

    Where the file cannot be made or locked nobody waits.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            file = stack.enter_context(path.open("ab"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock file `path`; looks only, and works where one may not write."""
    try:
        import fcntl

        with open_no_follow(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):
        pass
    return _is_claimed(path)
