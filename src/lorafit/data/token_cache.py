"""Rows that were tokenised once are not tokenised again: folders named by a hash of all that decides their content.

An entry is a folder that was committed whole and is verified byte by byte when it is opened. Whatever goes wrong with
the cache costs time only: a damaged entry is made again, and without a place to write the tokens go to a temporary
folder. Entries hold tokens and counts, no paths.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lorafit.data.prompt import Renderer
from lorafit.data.readers import suffix_of
from lorafit.data.sources import RowReader, SourceFile
from lorafit.data.token_dataset import TokenDataset, encode_chunks, open_encoded
from lorafit.errors import DataError, RunError
from lorafit.storage.atomic import MANIFEST, commit_folder, read_facts, sha256_file, verify_folder
from lorafit.storage.cache_dir import cache_folder
from lorafit.storage.locks import exclusive_lock

ENCODING = 2  # to be raised whenever the same rows would be written as other bytes
MAX_BYTES = 20 * 10**9
_DECIDING_FILES = ("tokens.bin", "offsets.bin", "numbers.bin")
_BUILDING = ".building-"
_ABANDONED_SECONDS = 24 * 3600

# Writes the arrays to a folder and returns the facts that come with them.
Build = Callable[[Path], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Entry:
    """What was built, now or earlier: rows, the facts about them, and the SHA-256 of what training sees of them.

    `notes` is what a person should know about the cache.
    """

    encoded: TokenDataset
    facts: Mapping[str, Any]
    digest: str
    notes: tuple[str, ...]


def encode_files(
    files: Sequence[SourceFile],
    format: str,  # noqa: A002 (the name of the setting)
    renderer: Renderer,
    advance: Callable[[int, int], None] | None = None,
) -> Entry:
    """The rows of `files` as tokens; facts are those of `open_encoded`, and `files`: a summary of each.

    `advance` is told (bytes read, bytes in all). Raises DataError with the problems of all rows.
    """
    digests = [_sha256(file) for file in files]
    contents = [(suffix_of(file.path), digest) for file, digest in zip(files, digests, strict=True)]

    def build(folder: Path) -> dict[str, Any]:
        reader = RowReader(files, format)
        show = (lambda: advance(*reader.progress())) if advance else None
        facts = encode_chunks(reader.chunks(), renderer, folder, progress=show)
        for file, digest in zip(files, digests, strict=True):
            if _sha256(file) != digest:
                hint = "start again when nothing writes to it any more"
                raise DataError("the file changed while it was read", place=file.name, hint=hint)
        return {**facts, "files": [asdict(summary) for summary in reader.found]}

    return open_or_build(key_of(contents, format, renderer.contract.hash), build)


def _sha256(file: SourceFile) -> str:
    try:
        return sha256_file(file.path)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", place=file.name) from error


def key_of(contents: Sequence[tuple[str, str]], format: str, contract_hash: str) -> str:  # noqa: A002
    """The name of an entry: `contents` are kind and SHA-256 of each file in order, `format` is the one asked for."""
    decides = {
        "encoding": ENCODING,
        "tokenizers": version("tokenizers"),
        "jinja2": version("jinja2"),
        "byteorder": sys.byteorder,
        "contents": [list(content) for content in contents],
        "format": format,
        "contract": contract_hash,
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def open_or_build(key: str, build: Build) -> Entry:
    """The entry `key` of the user's cache, built unless it is there. What `build` raises goes through.

    Of processes that want the same entry at once, as the ranks of a run do, one builds it and the others wait.
    Raises RunError when the tokens can be stored nowhere.
    """
    notes: list[str] = []
    try:
        place = cache_folder("rows")
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        return _build_outside(key, build, f"the tokens are not cached: {_reason(error)}")
    try:
        with exclusive_lock(cache_folder("turns") / key[:2]):
            entry = _opened(place / key, notes) or _built(place, key, build, notes)
    except (OSError, RunError) as error:
        return _build_outside(key, build, f"the tokens are not cached: {_reason(error)}")
    with contextlib.suppress(OSError):
        os.utime(place / key)
        _make_room(place, key)
    return entry


def _opened(folder: Path, notes: list[str]) -> Entry | None:
    """The entry in `folder`, None if there is none that is whole."""
    if not folder.exists():
        return None
    if faults := verify_folder(folder):
        notes.append(f"the cached tokens were damaged and are made again: {faults[0]}")
        return None
    return _entry(folder, notes)


def _built(place: Path, key: str, build: Build, notes: Sequence[str]) -> Entry:
    """Build the entry beside the others, then give it its name, unless another process was quicker."""
    with _own_folder(place) as parent:
        _commit(parent / key, build)
        (parent / key).chmod(0o700)
        if (place / key).exists() and verify_folder(place / key):
            (place / key).rename(parent / "damaged")
        try:
            (parent / key).rename(place / key)
        except OSError:
            if not (place / key).exists():
                raise
    return _entry(place / key, notes)


def _build_outside(key: str, build: Build, note: str) -> Entry:
    """Build in a temporary folder whose files are gone once nobody reads them."""
    try:
        with _own_folder(Path(tempfile.gettempdir())) as parent:
            _commit(parent / key, build)
            return _entry(parent / key, [note])
    except (OSError, RunError) as error:
        raise RunError(
            f"the tokens of the rows cannot be stored: {_reason(error)}",
            place=tempfile.gettempdir(),
            hint="free space, or set LORAFIT_CACHE to a folder on a disk with room",
        ) from error


@contextlib.contextmanager
def _own_folder(place: Path) -> Iterator[Path]:
    """A folder of this process alone, gone with all that is still in it at the end."""
    folder = Path(tempfile.mkdtemp(prefix=_BUILDING, dir=place))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _commit(folder: Path, build: Build) -> None:
    facts: dict[str, Any] = {}
    commit_folder(folder, lambda staging: facts.update(build(staging)), facts)


def _entry(folder: Path, notes: Sequence[str]) -> Entry:
    facts = read_facts(folder)
    files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    digest = hashlib.sha256("".join(files[name]["sha256"] for name in _DECIDING_FILES).encode()).hexdigest()
    return Entry(open_encoded(folder, facts), facts, digest, tuple(notes))


def _make_room(place: Path, key: str) -> None:
    """Remove the entries that were not used for longest, beyond MAX_BYTES in all, and what a crash left."""
    entries = [path for path in place.iterdir() if path.is_dir() and path.name != key]
    used = {path: path.stat().st_mtime for path in entries}
    room = MAX_BYTES - _size(place / key)
    for path in sorted(entries, key=lambda path: -used[path]):
        if path.name.startswith(_BUILDING):
            if time.time() - used[path] > _ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
            continue
        room -= _size(path)
        if room < 0:
            shutil.rmtree(path, ignore_errors=True)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _reason(error: Exception) -> str:
    if isinstance(error, RunError):
        return error.problems[0].message
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
