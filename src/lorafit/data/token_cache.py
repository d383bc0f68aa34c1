"""Rows that were tokenised once are not tokenised again: folders named by a hash of all that decides their content.

An entry is a committed folder; every byte of it is verified when it is opened. A fault of the cache costs only time:
a damaged entry is built again, and where the cache cannot be written the tokens go to a temporary folder. Entries
hold tokens, counts and short excerpts, no paths.
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

import numpy as np
from numpy.typing import NDArray

from lorafit.data.folders import SourceFile
from lorafit.data.prompt import Renderer
from lorafit.data.sources import Reading, Sources
from lorafit.data.token_dataset import TokenDataset, encode_chunks, open_encoded
from lorafit.errors import DataError, RunError
from lorafit.hub.dataset_splits import suffix_of
from lorafit.redact import logger_of, one_line
from lorafit.storage.atomic import MANIFEST, read_facts, sha256_file, staging_folder, verify_folder
from lorafit.storage.cache_dir import cache_folder
from lorafit.storage.locks import exclusive_lock
from lorafit.storage.ownership import not_own

logger = logger_of(__name__)

ENCODING = 7  # to be raised whenever the same rows would be written as other bytes
MAX_BYTES = 20 * 10**9
_EMPTY = hashlib.sha256(b"").hexdigest()
_DECIDING_FILES = ("tokens.bin", "offsets.bin", "numbers.bin", "weighted.bin", "weights.bin")
_NUMBERS = "numbers.f64"
_BUILDING = ".building-"
_ABANDONED_SECONDS = 24 * 3600


@dataclass(frozen=True, slots=True)
class Entry:
    """Rows, the facts about them, and the SHA-256 of what training reads of them, built now or earlier.

    `key` is the name of the entry. `notes` are messages for the user about the cache.
    """

    encoded: TokenDataset
    facts: Mapping[str, Any]
    digest: str
    key: str
    notes: tuple[str, ...]


def encode_files(
    sources: Sources,
    renderer: Renderer,
    advance: Callable[[int, int], None] | None = None,
    most_readable: int | None = None,
) -> Entry:
    """The rows of `sources` as tokens; facts are those of `open_encoded`, and `files`: a summary of each.

    Of processes that need the same entry at once, as the ranks of a run do, one builds it and the others wait.
    `advance` is called with (bytes read, bytes in all); `most_readable` is as for `encode_chunks`. Raises DataError
    with the problems of all rows, and RunError when the tokens can be stored nowhere.
    """
    files = sources.files
    digests = [_sha256(file) for file in files]
    contents = [
        (suffix_of(file.path.name), f"{digest} {file.first} {file.stop}")
        for file, digest in zip(files, digests, strict=True)
    ]
    key = key_of(contents, sources.reading, renderer.contract.hash)
    notes: list[str] = []
    try:
        with exclusive_lock(_cache("turns") / key[:2], _report_holder) as alive:
            if not _is_whole(folder := _cache() / key, notes):
                with writing(_cache(), key) as (staging, facts):
                    facts |= _encode(sources, digests, renderer, advance, most_readable, staging, alive)
            entry = _entry(folder, notes)
    except (OSError, RunError) as error:
        notes = [f"the tokens are not cached: {_reason(error)}"]
    else:
        with contextlib.suppress(OSError):
            os.utime(folder)
            _make_room(folder)
        return entry
    temporary = Path(tempfile.gettempdir())
    try:
        with _own_folder(temporary) as parent:
            with writing(parent, key) as (staging, facts):
                facts |= _encode(sources, digests, renderer, advance, most_readable, staging)
            return _entry(parent / key, notes)  # its files stay readable after the folder is removed
    except (OSError, RunError) as error:
        raise RunError(
            f"the tokens of the rows cannot be stored: {_reason(error)}",
            place=str(temporary),
            hint="free space, or set LORAFIT_CACHE to a folder on a disk with room",
        ) from error


def key_of(contents: Sequence[tuple[str, str]], reading: Reading, contract_hash: str) -> str:
    """The name of an entry: `contents` are kind and SHA-256 of each file in order."""
    decides = {
        "encoding": ENCODING,
        "tokenizers": version("tokenizers"),
        "jinja2": version("jinja2"),
        "byteorder": sys.byteorder,
        "contents": [list(content) for content in contents],
        "reading": asdict(reading),
        "contract": contract_hash,
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def load_facts(key: str) -> dict[str, Any] | None:
    """The facts that `store_facts` stored beside the tokens, None if there are none that are whole."""
    with contextlib.suppress(OSError):
        if _is_whole(folder := _cache() / key, []):
            os.utime(folder)
            return read_facts(folder)
    return None


def store_facts(key: str, facts: Mapping[str, Any]) -> None:
    """Store JSON values under a name that hashes all that decides them; nothing happens where that fails."""
    with contextlib.suppress(OSError, RunError):
        shutil.rmtree(_cache() / key, ignore_errors=True)  # it was not usable
        with writing(_cache(), key) as (_, stored):
            stored |= facts


def load_array(key: str, shape: tuple[int, ...]) -> NDArray[np.float64] | None:
    """The numbers that `store_array` stored under `key`, None if there are none of this shape that are whole."""
    with contextlib.suppress(OSError, ValueError):
        if _is_whole(folder := _cache() / key, []):
            os.utime(folder)
            return np.frombuffer((folder / _NUMBERS).read_bytes(), np.float64).reshape(shape).copy()
    return None


def store_array(key: str, values: NDArray[np.float64]) -> None:
    """Store numbers under a name that hashes all that decides them; nothing happens where that fails."""
    with contextlib.suppress(OSError, RunError):
        shutil.rmtree(_cache() / key, ignore_errors=True)  # it was not usable
        with writing(_cache(), key) as (staging, _):
            (staging / _NUMBERS).write_bytes(values.tobytes())


@contextlib.contextmanager
def writing(root: Path, key: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder and facts to fill; when the block ends they become the entry `key` of `root`.

    Another process may have committed the same entry meanwhile; then its entry stays, unless that is damaged.
    """
    facts: dict[str, Any] = {}
    with _own_folder(root) as parent:
        with staging_folder(parent / key, facts, {}) as staging:
            yield staging, facts
        (parent / key).chmod(0o700)
        if (root / key).exists() and verify_folder(root / key):
            (root / key).rename(parent / "damaged")
        try:
            (parent / key).rename(root / key)
        except OSError:
            if not (root / key).exists():
                raise


@contextlib.contextmanager
def _own_folder(root: Path) -> Iterator[Path]:
    """A folder of this process alone; it is removed at the end with all that is still in it."""
    folder = Path(tempfile.mkdtemp(prefix=_BUILDING, dir=root))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _cache(name: str = "rows") -> Path:
    try:
        return cache_folder(name)
    except RuntimeError as error:  # there is no home folder
        raise OSError(str(error)) from error


def _report_holder(holder: str) -> None:
    logger.warning("the same rows are being tokenised, and this run waits for it: %s", one_line(holder))


def _sha256(file: SourceFile) -> str:
    try:
        return sha256_file(file.path)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", place=file.name) from error


def _encode(
    sources: Sources,
    digests: Sequence[str],
    renderer: Renderer,
    advance: Callable[[int, int], None] | None,
    most_readable: int | None,
    folder: Path,
    alive: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Write the tokens to `folder` and return the facts; `alive` is called after each chunk.

    Raises DataError, also for a file that changed meanwhile.
    """
    reader = sources.reader()

    def show() -> None:
        alive()
        if advance:
            advance(*reader.progress())

    facts = encode_chunks(
        reader.chunks(),
        renderer,
        folder,
        progress=show,
        drops=sources.reading.drops,
        most_readable=most_readable,
    )
    for file, digest in zip(sources.files, digests, strict=True):
        if _sha256(file) != digest:
            hint = "start again when no other program writes to it"
            raise DataError("the file changed while it was read", place=file.name, hint=hint)
    return {**facts, "files": [asdict(summary) for summary in reader.summaries]}


def _is_whole(folder: Path, notes: list[str]) -> bool:
    """Whether the entry in `folder` exists without a fault; `notes` receives a fault."""
    if not folder.exists():
        return False
    if faults := [reason for reason in [not_own(folder)] if reason] or verify_folder(folder):
        notes.append(f"the cached tokens were damaged and are made again: {faults[0]}")
    return not faults


def _entry(folder: Path, notes: Sequence[str]) -> Entry:
    facts = read_facts(folder)
    files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    sums = [files[name]["sha256"] for name in _DECIDING_FILES]
    # without weights the digest is that of version 0.1, whose runs resume
    digest = hashlib.sha256("".join(one for one in sums if one != _EMPTY).encode()).hexdigest()
    return Entry(open_encoded(folder, facts), facts, digest, folder.name, tuple(notes))


def _make_room(used: Path) -> None:
    """Remove the least recently used entries beside `used` beyond MAX_BYTES in all, and what a crash left."""
    entries = [path for path in used.parent.iterdir() if path.is_dir() and path != used]
    times = {path: path.stat().st_mtime for path in entries}
    room = MAX_BYTES - _size(used)
    for path in sorted(entries, key=lambda path: -times[path]):
        if path.name.startswith(_BUILDING):
            if time.time() - times[path] > _ABANDONED_SECONDS:
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
