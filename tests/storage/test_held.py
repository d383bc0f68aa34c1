"""What a process holds must stay at its path, and a folder has one writer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lorafit.errors import RunError
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import (
    clean_orphans,
    commit_files,
    refuse_while_written,
    staging_folder,
    verify_folder,
)
from lorafit.storage.locks import lock

MOVED = "the run directory was moved or replaced"


def replace(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))
    shutil.copytree(folder.with_name("moved"), folder)


def lock_of_another(folder: Path) -> None:
    (folder / "run.lock").unlink()
    (folder / "run.lock").touch()


def same_lock_in_another_folder(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))
    folder.mkdir()
    (folder.with_name("moved") / "run.lock").rename(folder / "run.lock")


CHANGES: list[Callable[[Path], object]] = [
    *(shutil.rmtree, replace, lock_of_another, same_lock_in_another_folder),
    lambda folder: folder.rename(folder.with_name("moved")),
    lambda folder: (folder / "run.lock").unlink(),
]


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_written_after_the_folder_or_the_lock_changed(
    tmp_path: Path, change: Callable[[Path], object]
) -> None:
    run = RunDirectory(tmp_path / "run")
    run.create()
    with run.locked():
        for step in (1, 2):
            commit_files(run.path / f"checkpoints-{step}", {"a": b"1"}, {}, run.check_held)
            (run.checkpoint(step)).mkdir(parents=True)
        keep, check = run.keep_locked()
        with keep:
            change(run.path)
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        acts: list[Callable[[], object]] = [
            run.check_held,
            check,
            run.clean,
            lambda: run.rotate(1),
            lambda: run.set_aside(1),
            lambda: run.write_json(run.proof_file, {}),
            lambda: commit_files(run.adapter, {"a": b"1"}, {}, run.check_held),
        ]
        for act in acts:
            with pytest.raises(RunError, match=MOVED):
                act()
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_link_to_the_same_folder_is_the_same_folder(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.create()
    with run.locked():
        run.path.rename(tmp_path / "moved")
        run.path.symlink_to(tmp_path / "moved")
        commit_files(run.adapter, {"a": b"1"}, {}, run.check_held)
    assert verify_folder(tmp_path / "moved" / "adapter") == []


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_that_changes_during_a_commit_keeps_what_is_there_now(
    tmp_path: Path, change: Callable[[Path], object]
) -> None:
    run = RunDirectory(tmp_path / "run")
    run.create()
    commit_files(run.adapter, {"a": b"old"}, {})
    with (
        run.locked(),
        pytest.raises(RunError, match=MOVED),
        staging_folder(run.adapter, {}, {}, check=run.check_held) as staging,
    ):
        (staging / "a").write_bytes(b"new")
        change(run.path)
    for folder in tmp_path.rglob("adapter"):
        assert (folder / "a").read_bytes() == b"old"


def test_a_folder_has_one_writer_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with staging_folder(folder, {}, {}) as staging:
        (staging / "a").write_bytes(b"1")
        with pytest.raises(RunError, match="another process is writing `out`"):
            commit_files(folder, {"a": b"2"}, {})
        with pytest.raises(RunError, match="another process is writing `out`"):
            refuse_while_written(folder)
        clean_orphans(tmp_path)
    assert (folder / "a").read_bytes() == b"1"
    refuse_while_written(folder)
    commit_files(folder, {"a": b"2"}, {})
    assert (folder / "a").read_bytes() == b"2"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_staging_folder_that_another_took_is_not_committed(tmp_path: Path) -> None:
    """On a file system without locks of folders."""
    folder = tmp_path / "out"
    message = "`out` was moved or replaced while it was written"
    with pytest.raises(RunError, match=message), staging_folder(folder, {}, {}) as staging:
        staging.rename(tmp_path / "mine")
        staging.mkdir()
        (staging / "a").write_bytes(b"of another")
    assert (staging / "a").read_bytes() == b"of another"
    assert not folder.exists()


def test_a_lock_that_is_replaced_while_it_is_taken_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    path, flock = tmp_path / "run.lock", fcntl.flock

    def late(file: object, how: int) -> None:
        flock(file, how)  # type: ignore[arg-type]
        path.unlink()
        path.touch()

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(RunError, match=MOVED), lock(path):
        pass
