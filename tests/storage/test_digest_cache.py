"""Digests of large files: read once for each state of a file, and never believed for another state."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from lorafit.storage import digest_cache
from lorafit.storage.cache_dir import cache_folder
from lorafit.storage.digest_cache import cached_sha256


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(b"some weights")
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """The files that are read. All count as unchanged for a while, in a new cache."""
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digest_cache, "SETTLED_SECONDS", -1000.0)
    monkeypatch.setattr(digest_cache, "_known", {})
    read: list[Path] = []
    sha256_file = digest_cache.sha256_file
    monkeypatch.setattr(digest_cache, "sha256_file", lambda path: read.append(path) or sha256_file(path))
    return read


def digest_in_new_process(path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(digest_cache, "_known", {})
    return cached_sha256(path)


def rewrite(path: Path, content: bytes) -> None:
    """Write over the file, until the file system's clock has gone on, and put its modification time back."""
    before = path.stat()
    while path.stat().st_ctime_ns == before.st_ctime_ns:
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_file_is_read_once_under_any_path(
    file: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    link = file.with_name("link")
    link.symlink_to(file)
    wanted = hashlib.sha256(b"some weights").hexdigest()
    for path in (file, file, link):
        assert cached_sha256(path) == wanted
        assert digest_in_new_process(path, monkeypatch) == wanted
    assert reads == [file]


def test_other_bytes_with_the_same_size_and_time_are_read(
    file: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cached_sha256(file)
    rewrite(file, b"Some weights")
    assert cached_sha256(file) == hashlib.sha256(b"Some weights").hexdigest()
    new = file.with_name("new")
    new.write_bytes(b"SOME weights")
    os.utime(new, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    new.replace(file)
    assert digest_in_new_process(file, monkeypatch) == hashlib.sha256(b"SOME weights").hexdigest()
    assert len(reads) == 3


def test_a_file_that_has_just_changed_is_not_kept(
    file: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest_cache, "SETTLED_SECONDS", 1e9)
    cached_sha256(file)
    cached_sha256(file)
    assert len(reads) == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "other json", "folder of others"])
def test_a_cache_that_cannot_be_believed_is_not_used(
    damage: str, file: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = cached_sha256(file)
    folder = cache_folder("digests")
    (entry,) = folder.iterdir()
    text = entry.read_text()
    if damage == "flip":
        entry.write_text(text.replace(wanted, wanted[:-1] + ("0" if wanted[-1] != "0" else "1")))
    elif damage == "cut":
        entry.write_text(text[:-5])
    elif damage == "other json":
        entry.write_text("[1]")
    else:
        folder.chmod(0o777)
    assert digest_in_new_process(file, monkeypatch) == wanted
    assert len(reads) == 2
    digest_in_new_process(file, monkeypatch)
    assert len(reads) == (3 if damage == "folder of others" else 2)
