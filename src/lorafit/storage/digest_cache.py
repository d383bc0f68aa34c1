"""SHA-256 of large files that seldom change, kept in the cache for as long as a file stays as it is."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from pathlib import Path

from lorafit.errors import RunError
from lorafit.storage.atomic import sha256_file, write_file
from lorafit.storage.cache_dir import cache_folder
from lorafit.storage.safe_read import MB, read_json

# The clock of a file system is coarse: a file that changed that recently may change again and keep its times.
SETTLED_SECONDS = 2.0

_State = tuple[int, ...]
_known: dict[tuple[Path, _State], str] = {}  # also where there is no cache


def cached_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; they are read again only where its size, times or inode changed.

    Raises OSError where the file cannot be read. Without a cache of the user's own, each process reads the file.
    """
    path = path.resolve()
    state = _state(path)
    if digest := _known.get((path, state)) or _stored(path, state):
        return digest
    is_settled = time.time() - path.stat().st_ctime > SETTLED_SECONDS
    digest = sha256_file(path)
    if is_settled and _state(path) == state:
        _known[path, state] = digest
        with contextlib.suppress(OSError, RuntimeError, RunError):
            write_file(_entry(path), json.dumps(_signed(path, state, digest)))
    return digest


def _stored(path: Path, state: _State) -> str:
    """The digest in the cache, "" where there is none for this state of the file."""
    with contextlib.suppress(OSError, RuntimeError, ValueError, TypeError, KeyError):
        entry = read_json(_entry(path), MB)
        if entry == _signed(path, state, digest := str(entry["sha256"])):
            return digest
    return ""


def _signed(path: Path, state: _State, digest: str) -> dict[str, object]:
    """An entry of the cache; `check` finds a damaged one."""
    check = hashlib.sha256(f"{path} {state} {digest}".encode(errors="surrogateescape")).hexdigest()
    return {"state": list(state), "sha256": digest, "check": check}


def _entry(path: Path) -> Path:
    """The file of an entry. Raises OSError where the cache is not the user's own."""
    return cache_folder("digests") / hashlib.sha256(bytes(path)).hexdigest()


def _state(path: Path) -> _State:
    """What changes when a file is written or replaced; the time of its last change cannot be set by a program."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
