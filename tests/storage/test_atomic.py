"""Committed folders are whole or not there, every changed bit is found, and the lock dies with its holder."""

from __future__ import annotations

import errno
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from lorafit.errors import RunError
from lorafit.storage import atomic
from lorafit.storage.atomic import (
    MANIFEST,
    clean_orphans,
    make_folder,
    read_facts,
    staging_folder,
    verify_folder,
    write_file,
)
from lorafit.storage.locks import is_locked, lock

OLD = {"weights.bin": b"old weights", "deep/er/notes.txt": b"old"}
NEW = {"weights.bin": b"new weights!", "deep/er/notes.txt": b"new", "more.bin": b"\0\1\2"}


def files_of(folder: Path) -> dict[str, bytes]:
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    found.pop(MANIFEST, None)
    return found


def commit(folder: Path, files: dict[str, bytes], **facts: Any) -> Path:
    make_folder(folder.parent)
    with staging_folder(folder, facts, {}) as staging:
        for name, content in files.items():
            path = staging / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.write(content)
    return folder


def test_what_is_committed_reads_back_with_its_facts(tmp_path: Path) -> None:
    folder = commit(tmp_path / "deep" / "step-000001", OLD, step=1, name="안녕", nothing=None, share=0.1)
    assert files_of(folder) == OLD
    assert verify_folder(folder) == []
    assert read_facts(folder) == {"step": 1, "name": "안녕", "nothing": None, "share": 0.1}
    assert [path.name for path in folder.parent.iterdir()] == ["step-000001"]


def test_a_commit_replaces_what_was_there(tmp_path: Path) -> None:
    folder = commit(tmp_path / "adapter", NEW, step=1)
    commit(folder, OLD, step=2)
    assert files_of(folder) == OLD
    assert verify_folder(folder) == []
    assert read_facts(folder) == {"step": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """In the files and in the manifest itself: a run that resumes from other facts is another run."""
    folder = commit(tmp_path / "folder", {"a": b"\0w"}, step=12)
    for path in (folder / "a", folder / MANIFEST):
        content = path.read_bytes()
        with path.open("r+b", buffering=0) as file:
            for at, byte in enumerate(content):
                for bit in range(8):
                    os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), at)
                    assert verify_folder(folder), f"bit {bit} of byte {at} of {path.name}"
                os.pwrite(file.fileno(), bytes([byte]), at)
    assert verify_folder(folder) == []


def test_missing_extra_and_truncated_files_are_named(tmp_path: Path) -> None:
    folder = commit(tmp_path / "folder", OLD)
    (folder / "weights.bin").write_bytes(b"old weight")
    (folder / "deep/er/notes.txt").unlink()
    (folder / "virus.bin").write_bytes(b"")
    assert verify_folder(folder) == [
        "`deep/er/notes.txt` is missing",
        "`virus.bin` is not in the manifest",
        "`weights.bin` has 10 bytes, 11 were written",
    ]


def test_no_manifest_or_an_unknown_one_is_a_fault(tmp_path: Path) -> None:
    folder = commit(tmp_path / "folder", OLD)
    manifest = folder / MANIFEST
    manifest.write_text(manifest.read_text().replace('"schema": 1', '"schema": 9'))
    assert verify_folder(folder) == ["`manifest.json` has schema 9, this lorafit reads 1"]
    manifest.unlink()
    assert verify_folder(folder) == ["`manifest.json` is missing"]
    assert verify_folder(tmp_path / "nowhere") == ["`manifest.json` is missing"]


@given(st.binary(max_size=200) | st.from_regex(rb'\{"schema": ?1, ?"files": ?.{0,40}\}', fullmatch=True))
def test_any_manifest_is_a_fault_and_never_an_exception(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / MANIFEST).write_bytes(content)
        assert verify_folder(Path(name))


class PowerCut(BaseException):
    """After it nothing of ours runs that could undo anything."""


def no_space(path: object) -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


class Disk:
    """Counts calls that change the disk; the one after `allowed` of them fails with `error`."""

    def __init__(
        self, patch: pytest.MonkeyPatch, allowed: float, error: Callable[[object], BaseException] = no_space
    ) -> None:
        self.calls: list[str] = []
        self.allowed, self.error = allowed, error
        for owner, name in ((os, "fsync"), (os, "rename"), (os, "mkdir"), (Path, "open")):
            patch.setattr(owner, name, self._guard(name, getattr(owner, name)))

    def _guard(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def act(*arguments: Any, **named: Any) -> Any:
            reads = name == "open" and "w" not in str(arguments[1:])
            if not reads and not (name == "mkdir" and os.path.isdir(arguments[0])):  # noqa: PTH112
                self.calls.append(name)
                if len(self.calls) == self.allowed + 1:
                    raise self.error(arguments[0])
            return real(*arguments, **named)

        return act


def calls_of_a_commit(folder: Path) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, allowed=float("inf"))
        commit(folder, NEW)
    assert set(disk.calls) == {"fsync", "rename", "mkdir", "open"}
    return disk.calls


@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
def test_a_disk_that_fills_up_at_any_moment_leaves_what_was_there(replacing: bool, tmp_path: Path) -> None:
    (tmp_path / "dry").mkdir()
    if replacing:
        commit(tmp_path / "dry" / "folder", OLD)
    calls = calls_of_a_commit(tmp_path / "dry" / "folder")
    assert calls.count("rename") == (2 if replacing else 1)
    for moment in range(len(calls)):
        parent = tmp_path / str(moment)
        parent.mkdir()
        if replacing:
            commit(parent / "folder", OLD, step=1)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(RunError, match="No space left") as caught:
            Disk(patch, allowed=moment)
            commit(parent / "folder", NEW, step=2)
        problem = caught.value.problems[0]
        assert str(parent) in problem.place or problem.place.isdigit(), (
            moment
        )  # fsync knows a descriptor only
        assert problem.hint
        assert (parent / "folder").exists() == replacing, moment
        if replacing:
            assert verify_folder(parent / "folder") == [], moment
            assert files_of(parent / "folder") == OLD
        commit(parent / "folder", NEW, step=2)  # with space again
        assert files_of(parent / "folder") == NEW
        assert [path.name for path in parent.iterdir()] == ["folder"], moment


def test_a_disk_that_fills_up_under_safetensors_is_an_error_of_the_run(tmp_path: Path) -> None:
    """safetensors raises its own exception for it, which is no OSError."""

    def write(staging: Path) -> None:
        resource = pytest.importorskip("resource")
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            save_file({"weight": torch.zeros(1000)}, staging / "weights.safetensors")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)

    folder = commit(tmp_path / "folder", OLD)
    message = "cannot save `folder`.*File too large"
    with pytest.raises(RunError, match=message), staging_folder(folder, {}, {}) as staging:
        write(staging)
    assert files_of(folder) == OLD
    assert verify_folder(folder) == []


def test_what_does_not_read_back_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = commit(tmp_path / "folder", OLD)
    monkeypatch.setattr(atomic, "verify_folder", lambda folder: ["`weights.bin` has changed"])
    with pytest.raises(RunError, match="does not read back: `weights.bin` has changed"):
        commit(folder, NEW)
    monkeypatch.undo()
    assert files_of(folder) == OLD
    assert verify_folder(folder) == []


def test_a_power_cut_at_any_moment_leaves_the_old_folder_or_the_new_one(tmp_path: Path) -> None:
    """Nothing after the cut runs, not even our own undoing; the next start cleans up."""

    commit(tmp_path / "dry" / "folder", OLD)
    calls = calls_of_a_commit(tmp_path / "dry" / "folder")
    outcomes = []
    for moment in range(len(calls)):
        parent = tmp_path / str(moment)
        commit(parent / "folder", OLD)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(PowerCut):
            Disk(patch, moment, PowerCut)
            commit(parent / "folder", NEW)
        clean_orphans(parent)
        assert verify_folder(parent / "folder") == [], moment
        outcomes.append(files_of(parent / "folder") == NEW)
        assert outcomes[-1] or files_of(parent / "folder") == OLD
        assert [path.name for path in parent.iterdir()] == ["folder"], moment
    assert outcomes == sorted(outcomes)  # first always the old, from one moment on the new
    assert {True, False} == set(outcomes)


def test_cleaning_touches_nothing_else(tmp_path: Path) -> None:
    folder = commit(tmp_path / "step-000002", NEW)
    folder.rename(tmp_path / ".old-step-000002")
    commit(tmp_path / "step-000001", OLD)
    (tmp_path / ".staging-step-000003").mkdir()
    (tmp_path / ".old-step-000001").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    clean_orphans(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"step-000001", "step-000002", "notes.txt"}
    assert verify_folder(folder) == []
    clean_orphans(tmp_path / "nowhere")


def test_a_small_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.yaml"
    write_file(path, "old: 1\n")
    for name in ("fsync", "replace"):
        with (
            monkeypatch.context() as patch,
            pytest.raises(RunError, match=r"cannot write `config.yaml`: No space"),
        ):
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            patch.setattr(os, name, lambda *_, error=error: (_ for _ in ()).throw(error))
            write_file(path, "new: 2\n")
        assert path.read_text() == "old: 1\n"
    write_file(path, "new: 두\n")
    assert path.read_text(encoding="utf-8") == "new: 두\n"


def test_the_lock_excludes_other_processes_and_dies_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    assert not is_locked(path)
    assert not path.exists()  # looking makes nothing
    source = (
        "import sys; from pathlib import Path; from lorafit.storage.locks import lock\n"
        "with lock(Path(sys.argv[1])):\n print('held', flush=True)\n sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", source, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "held\n"
            assert is_locked(path)
            assert path.read_text() == str(child.pid)  # looking changes nothing
            with (
                pytest.raises(
                    RunError, match=rf"another process is writing this run \(process {child.pid}\)"
                ),
                lock(path),
            ):
                pass
        finally:
            child.kill()
    assert not is_locked(path)
    with lock(path):
        assert is_locked(path)
        assert path.read_text() == str(os.getpid())
    assert not is_locked(path)


@pytest.mark.skipif(os.name == "nt", reason="patches flock")
def test_without_locks_of_the_file_system_a_claim_excludes_others_and_a_dead_one_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    path, claim = tmp_path / "run.lock", tmp_path / "run.lock.holder"
    with lock(path) as held:
        held.check()
        assert is_locked(path)
        held_by_us = f"another process is writing this run .process {os.getpid()} on"
        with pytest.raises(RunError, match=held_by_us), lock(path):
            pass
        assert claim.exists()
    assert not claim.exists()
    assert not is_locked(path)

    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    )
    claim.write_text(f"{dead.stdout.strip()} on {platform.node()}")
    assert not is_locked(path)
    with lock(path):
        assert claim.read_text() == f"{os.getpid()} on {platform.node()}"
    claim.write_text("1 on another-machine")
    with pytest.raises(RunError, match=f"remove {claim}"), lock(path):
        pass


def test_a_run_that_cannot_be_locked_is_an_error_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught, lock(tmp_path / "nowhere" / "run.lock"):
        pass
    assert caught.value.problems[0].place == str(tmp_path / "nowhere")
