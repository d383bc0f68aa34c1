"""Folders and files that are written as a whole or not at all: stage, sync, manifest, rename, read back.

A committed folder holds `manifest.json`, written last, with the size and SHA-256 of every other file and the
caller's facts. Because of the order of the calls (files, manifest, folder, rename, parent), a crash at any point
leaves the old state or the new one, never a mixture (Pillai et al., OSDI 2014, on what file systems guarantee).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lorafit.errors import LorafitError, RunError
from lorafit.storage.safe_read import MB, parse_json, read_bytes

MANIFEST = "manifest.json"
MAX_MANIFEST = 64 * MB
SCHEMA = 1
BLOCK = 4096  # the least number of bytes that a file takes
_STAGING, _OLD = ".staging-", ".old-"


_RESUME = "free space or fix the disk, then `lorafit train --resume` continues from the last checkpoint"


def commit_files(folder: Path, files: Mapping[str, bytes], facts: Mapping[str, Any]) -> None:
    """Make `folder` hold exactly `files`, by name, as `staging_folder` does. They must read back as they are here."""
    known: dict[str, str] = {}
    with staging_folder(folder, facts, known, sum(map(len, files.values()))) as staging:
        for name, content in files.items():
            (staging / name).write_bytes(content)
            known[name] = hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def run_error(what: str, place: Path, num_bytes: int | None = None, hint: str = "") -> Iterator[None]:
    """Raise an OSError of the block as a RunError with `what` failed, why, and the `num_bytes` that it needs."""
    try:
        yield
    except OSError as error:
        needed = f" ({num_bytes:,} bytes are needed)" if num_bytes is not None else ""
        raise RunError(f"{what}: {error.strerror or error}{needed}", place=str(place), hint=hint) from error


@contextlib.contextmanager
def staging_folder(
    folder: Path,
    facts: Mapping[str, Any],
    known: Mapping[str, str],
    num_bytes: int | None = None,
    hint: str = _RESUME,
) -> Iterator[Path]:
    """A folder to write to, also in folders of its own; when the block ends without an error it becomes `folder`.

    An existing `folder` is replaced. The manifest stores `facts`. Files read back with the SHA-256 that `known` has
    under their name, that of their content in memory. Both are read when the block ends, so the block may fill them.
    Raises RunError when anything cannot be written, with the old folder untouched; the error names `num_bytes` as
    what is needed.
    """
    staging, old = folder.with_name(_STAGING + folder.name), folder.with_name(_OLD + folder.name)
    placed = False
    try:
        make_folder(folder.parent)
        clean_orphans(folder.parent, folder.name)
        staging.mkdir(0o755)
        yield staging
        files = {}
        for path in _files(staging):
            sync(path)
            _drop_page_cache(path)
            name = path.relative_to(staging).as_posix()
            files[name] = {"size": path.stat().st_size, "sha256": known.get(name) or sha256_file(path)}
        manifest = {"schema": SCHEMA, "files": files, "facts": dict(facts)}
        _write_synced(staging / MANIFEST, _manifest_text(manifest))
        for directory in sorted({staging, *(path.parent for path in _files(staging))}, reverse=True):
            sync(directory)
        if folder.exists():
            folder.rename(old)
        staging.rename(folder)
        placed = True
        sync(folder.parent)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as an error of its own
        _roll_back(folder, staging, old, placed)
        reason = error.strerror if isinstance(error, OSError) else None
        needed = f" ({num_bytes:,} bytes are needed)" if num_bytes is not None else ""
        raise RunError(
            f"cannot save `{folder.name}`: {reason or error}{needed}",
            place=str(getattr(error, "filename", None) or folder),
            hint=hint,
        ) from error
    except (Exception, KeyboardInterrupt):
        _roll_back(folder, staging, old, placed)
        raise
    if faults := verify_folder(folder):
        _roll_back(folder, staging, old, placed)
        raise RunError(
            f"what was written to `{folder.name}` does not read back: {faults[0]}",
            place=str(folder),
            hint="the disk or its driver does not keep what is written; older checkpoints are untouched",
        )
    shutil.rmtree(old, ignore_errors=True)


def make_folder(folder: Path) -> None:
    """Make `folder` and its missing parents, each synced into its parent. Raises OSError.

    One that exists may have been made by a killed process that did not sync it: see `RunDirectory.clean`.
    """
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(0o755, exist_ok=True)  # never for others to write
    sync(folder.parent)


def verify_folder(folder: Path, *, may_have_more: bool = False) -> list[str]:
    """What is wrong with a committed folder; empty when every byte is as it was written.

    A file that the manifest does not list is a fault unless the folder `may_have_more`.
    """
    try:
        text = read_bytes(folder / MANIFEST, MAX_MANIFEST).decode()
        manifest = parse_json(text)
        schema, listed = manifest["schema"], manifest["files"]
        entries = {name: (entry["size"], entry["sha256"]) for name, entry in listed.items()}
        manifest["facts"].keys()
    except FileNotFoundError:
        return [f"`{MANIFEST}` is missing"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [f"`{MANIFEST}` cannot be read"]
    if schema != SCHEMA:
        return [f"`{MANIFEST}` has schema {schema}, this lorafit reads {SCHEMA}"]
    if text != _manifest_text(manifest):
        return [f"`{MANIFEST}` has changed since it was written (its own SHA-256 differs)"]
    faults = []
    present = {path.relative_to(folder).as_posix() for path in _files(folder)} - {MANIFEST}
    faults += [f"`{name}` is missing" for name in sorted(entries.keys() - present)]
    if not may_have_more:
        faults += [f"`{name}` is not in the manifest" for name in sorted(present - entries.keys())]
    for name in sorted(entries.keys() & present):
        size, digest = entries[name]
        path = folder / name
        try:
            if path.stat().st_size != size:
                faults.append(f"`{name}` has {path.stat().st_size} bytes, {size} were written")
            elif sha256_file(path) != digest:
                faults.append(f"`{name}` has changed since it was written (SHA-256 differs)")
        except OSError as error:
            faults.append(f"`{name}` cannot be read: {error.strerror or error}")
    return faults


def check_manifest(folder: Path, what: str, error: type[LorafitError] = RunError) -> None:
    """Raise `error` if `folder` has a manifest and a file of it is not as it was written; `what` names the folder."""
    if (folder / MANIFEST).is_file() and (faults := verify_folder(folder, may_have_more=True)):
        raise error(f"{what} is damaged: {faults[0]}", place=str(folder))


def read_facts(folder: Path) -> dict[str, Any]:
    """The facts in the manifest of a committed folder, which `verify_folder` has found whole."""
    facts = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["facts"]
    assert isinstance(facts, dict)
    return facts


def is_orphan(name: str) -> bool:
    """Whether a file or folder of that name is left from an unfinished commit."""
    return name.startswith((_STAGING, _OLD))


def clean_orphans(parent: Path, only: str | None = None) -> None:
    """Remove what a crash left of unfinished commits (of the folder `only`) in `parent`.

    A folder that was about to be replaced gets its name back. Raises OSError.
    """
    for path in sorted(parent.iterdir()) if parent.is_dir() else ():
        prefix = next((prefix for prefix in (_OLD, _STAGING) if path.name.startswith(prefix)), "")
        whole = path.with_name(path.name.removeprefix(prefix) or path.name)
        if not prefix or only not in (None, whole.name):
            continue
        if prefix == _OLD and not whole.exists():
            path.rename(whole)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove `folder`. Its name disappears first, in one rename. Raises OSError where that fails."""
    staging = folder.with_name(_STAGING + folder.name)
    shutil.rmtree(staging, ignore_errors=True)
    folder.rename(staging)
    shutil.rmtree(staging, ignore_errors=True)


def write_file(path: Path, text: str) -> None:
    """Replace one small text file atomically and durably. Raises RunError."""
    temporary = path.with_name(_STAGING + path.name)
    with run_error(f"cannot write `{path.name}`", path, len(text.encode())):
        temporary.unlink(missing_ok=True)  # it might be a link
        try:
            _write_synced(temporary, text)
            temporary.replace(path)
            sync(path.parent)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _roll_back(folder: Path, staging: Path, old: Path, placed: bool) -> None:
    """Undo a commit that failed: put the old folder back, if the disk allows it."""
    with contextlib.suppress(OSError):
        if placed:
            folder.rename(staging)
        if old.exists() and not folder.exists():
            old.rename(folder)
    shutil.rmtree(staging, ignore_errors=True)


def _manifest_text(manifest: Mapping[str, Any]) -> str:
    """The manifest as text, with the SHA-256 of its other keys, so that a change of its facts is detected too."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**rest, "sha256": digest}, indent=1, sort_keys=True) + "\n"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _write_synced(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        _fsync(file.fileno())


def sync(path: Path) -> None:
    """fsync a file, or a folder where the system allows it."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync(descriptor: int) -> None:
    if sys.platform == "darwin":  # fsync leaves the bytes in the drive's own cache there
        import fcntl

        with contextlib.suppress(OSError):  # not every file system has it
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def _drop_page_cache(path: Path) -> None:
    """Drop a synced file from the page cache, so that reading it back reads the disk. Best effort."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
