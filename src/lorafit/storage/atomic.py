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
from collections.abc import Callable, Iterable, Iterator, Mapping
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
_DISK_ERRORS = (OSError, SafetensorError)  # safetensors reports a full disk as an error of its own


_RESUME = "free space or fix the disk, then `lorafit train --resume` continues from the last checkpoint"


def _no_check() -> None:
    """The check of a place that only this process knows."""


def commit_files(
    folder: Path, files: Mapping[str, bytes], facts: Mapping[str, Any], check: Callable[[], None] = _no_check
) -> None:
    """Make `folder` hold exactly `files`, by name, as `staging_folder` does. They must read back as they are here."""
    known: dict[str, str] = {}
    num_bytes = sum(map(len, files.values()))
    with staging_folder(folder, facts, known, num_bytes, check=check) as staging:
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
    check: Callable[[], None] = _no_check,
) -> Iterator[Path]:
    """A folder to write to, also in folders of its own; when the block ends without an error it becomes `folder`.

    An existing `folder` is replaced; its parent must exist. The manifest stores `facts`. Files read back with the
    SHA-256 that `known` has under their name, that of their content in memory. Both are read when the block ends, so
    the block may fill them. `check` raises RunError where the place is not this process's any more. It is called
    before anything is made, before `folder` is replaced and at the end; after it has raised, nothing at the path is
    touched. Raises RunError when anything cannot be written, with the old folder untouched; the error names
    `num_bytes` as what is needed. Also where another process writes `folder`.
    """
    staging, old = folder.with_name(_STAGING + folder.name), folder.with_name(_OLD + folder.name)
    check()
    placed = False
    with _own_staging(folder, staging, num_bytes, hint, check) as made:

        def must_be_own() -> None:
            check()
            with contextlib.suppress(OSError):
                if identity((folder if placed else staging).lstat()) == made:
                    return
            raise RunError(f"`{folder.name}` was moved or replaced while it was written", place=str(folder))

        try:
            yield staging
            files = {}
            for path in _files(staging):
                sync(path)
                _drop_page_cache(path)
                name = path.relative_to(staging).as_posix()
                files[name] = {"size": path.stat().st_size, "sha256": known.get(name) or sha256_file(path)}
            manifest = {"schema": SCHEMA, "files": files, "facts": dict(facts)}
            _write_synced(staging / MANIFEST, [_manifest_text(manifest).encode()])
            for directory in sorted({staging, *(path.parent for path in _files(staging))}, reverse=True):
                sync(directory)
            must_be_own()
            if folder.exists():
                folder.rename(old)
            staging.rename(folder)
            placed = True
            sync(folder.parent)
            if faults := verify_folder(folder):
                raise RunError(
                    f"what was written to `{folder.name}` does not read back: {faults[0]}",
                    place=str(folder),
                    hint="the disk or its driver does not keep what is written; older checkpoints are untouched",
                )
            must_be_own()
        except (Exception, KeyboardInterrupt) as error:
            reported = _not_saved(folder, error, num_bytes, hint)
            try:
                must_be_own()
            except RunError as moved:
                reported = moved
            else:
                _roll_back(folder, staging, old, placed)
            if isinstance(error, _DISK_ERRORS):
                raise reported from error
            raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _own_staging(
    folder: Path, staging: Path, num_bytes: int | None, hint: str, check: Callable[[], None]
) -> Iterator[tuple[int, int]]:
    """Make the staging folder of `folder` and hold its lock in the block; yields its identity. Raises RunError."""
    try:
        clean_orphans(folder.parent, folder.name)
        staging.mkdir(0o755)
        descriptor = _hold(staging)
    except (FileExistsError, BlockingIOError):
        raise _being_written(folder) from None
    except OSError as error:
        check()
        raise _not_saved(folder, error, num_bytes, hint) from error
    try:
        yield identity(staging.lstat() if descriptor is None else os.fstat(descriptor))
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _hold(folder: Path) -> int | None:
    """A descriptor of `folder` that holds its lock until it is closed; None where the system opens no folders.

    Raises BlockingIOError where another process holds the lock. A network file system may have none.
    """
    if os.name == "nt":
        return None
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        pass
    return descriptor


def _is_held(folder: Path) -> bool:
    """Whether a living process writes to a staging folder."""
    try:
        descriptor = _hold(folder)
    except BlockingIOError:
        return True
    except OSError:
        return False
    if descriptor is not None:
        os.close(descriptor)
    return False


def refuse_while_written(folder: Path) -> None:
    """Raise RunError where another process is about to replace `folder`."""
    staging = folder.with_name(_STAGING + folder.name)
    if staging.is_dir() and _is_held(staging):
        raise _being_written(folder)


def _being_written(folder: Path) -> RunError:
    hint = "wait for it, stop it, or write to another folder"
    return RunError(f"another process is writing `{folder.name}`", place=str(folder), hint=hint)


def _not_saved(folder: Path, error: BaseException, num_bytes: int | None, hint: str) -> RunError:
    reason = error.strerror if isinstance(error, OSError) else None
    needed = f" ({num_bytes:,} bytes are needed)" if num_bytes is not None else ""
    place = str(getattr(error, "filename", None) or folder)
    return RunError(f"cannot save `{folder.name}`: {reason or error}{needed}", place=place, hint=hint)


def identity(status: os.stat_result) -> tuple[int, int]:
    """What makes a file or folder the same one under any path, as long as it exists or is open."""
    return status.st_dev, status.st_ino


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())


def make_folder(folder: Path) -> None:
    """Make `folder` and its missing parents, each synced into its parent. Raises OSError.

    One that exists may have been made by a killed process that did not sync it: see `RunDirectory.clean`.
    """
    if folder.is_dir():
        return
    make_folder(folder.parent)
    make_subfolder(folder)


def make_subfolder(folder: Path) -> None:
    """Make `folder`, synced into its parent, which must exist. Raises OSError."""
    if not folder.is_dir():
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

    A folder that was about to be replaced gets its name back. One that a living process writes stays. Raises OSError.
    """
    for path in sorted(parent.iterdir()) if parent.is_dir() else ():
        prefix = next((prefix for prefix in (_OLD, _STAGING) if path.name.startswith(prefix)), "")
        whole = path.with_name(path.name.removeprefix(prefix) or path.name)
        if not prefix or only not in (None, whole.name):
            continue
        if prefix == _OLD and not whole.exists():
            path.rename(whole)
        elif path.is_dir() and not path.is_symlink():
            if prefix == _OLD or not _is_held(path):
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
    """Replace one small text file atomically and durably. Raises RunError.

    A lone surrogate, which UTF-8 does not have, becomes its escape in JSON; names of files can hold some.
    """
    content = text.encode(errors="backslashreplace")
    write_lines(path, [content], len(content))


def write_lines(path: Path, lines: Iterable[bytes], num_bytes: int | None = None) -> None:
    """Replace a file by `lines` atomically and durably. Raises RunError, naming the `num_bytes` that are needed."""
    temporary = path.with_name(_STAGING + path.name)
    with run_error(f"cannot write `{path.name}`", path, num_bytes):
        temporary.unlink(missing_ok=True)  # it might be a link
        try:
            _write_synced(temporary, lines)
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


def _write_synced(path: Path, lines: Iterable[bytes]) -> None:
    with path.open("xb") as file:
        file.writelines(lines)
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
