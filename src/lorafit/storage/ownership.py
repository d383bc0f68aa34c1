"""Whether a file or folder is the user's own: nobody else has made it, and nobody else can write to it."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

_NOBODY = 65534  # whom Linux names as the owner where a container does not know the real one


def not_own(path: Path) -> str:
    """Why `path` is not the user's own, as the end of a sentence about it; "" if it is. Raises OSError."""
    if os.name == "nt":
        return ""
    status = path.stat()
    if status.st_uid != os.geteuid():
        return f"belongs to {_name(status.st_uid)}"
    if _others_can_write(status) and _keeps_modes(path if path.is_dir() else path.parent):
        return "can be written by other users"
    return ""


def not_safe_above(path: Path) -> str:
    """Why another user could put something else in the place of `path`, as a sentence; "" if none can. Raises OSError.

    Folders above are the user's or root's; one that others can write is sticky, as /tmp is.
    """
    if os.name == "nt":
        return ""
    trusted = {0, os.geteuid()} | ({_NOBODY} if _in_container() else set())
    for parent in dict.fromkeys((*path.absolute().parents, *Path(os.path.realpath(path)).parents)):
        status = parent.stat()
        if parent == Path(parent.anchor):
            continue
        if status.st_uid not in trusted:
            return f"`{parent}` belongs to {_name(status.st_uid)}"
        if _others_can_write(status) and not status.st_mode & stat.S_ISVTX:
            return f"`{parent}` can be written by other users"
    return ""


@contextlib.contextmanager
def nobody_else_writes() -> Iterator[None]:
    """In the block, what this process makes can be written by its user only, and read as the umask allows."""
    before = os.umask(0o022)
    os.umask(before | 0o022)
    try:
        yield
    finally:
        os.umask(before)


def _others_can_write(status: os.stat_result) -> bool:
    if status.st_mode & stat.S_IWOTH:
        return True
    return bool(status.st_mode & stat.S_IWGRP) and not _is_of_one_user(status.st_gid)


def _is_of_one_user(group: int) -> bool:
    """Whether a group is the one that many systems make for each user, with the user's name."""
    import grp
    import pwd

    try:
        return grp.getgrgid(group).gr_name == pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return False


def _keeps_modes(folder: Path) -> bool:
    """Whether the file system has permissions at all; a Windows disk under Linux has none."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:  # made for its user alone
            return not os.fstat(file.fileno()).st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    except OSError:
        return True


def _in_container() -> bool:
    """Whether this process sees some users' files as nobody's."""
    try:
        return int(Path("/proc/self/uid_map").read_text(encoding="ascii").split()[2]) < 2**32 - 1
    except (OSError, ValueError, IndexError):
        return False


def _name(user: int) -> str:
    import pwd

    try:
        return f"user {pwd.getpwuid(user).pw_name}"
    except KeyError:
        return f"user {user}"
