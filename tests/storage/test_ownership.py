"""Whose a folder is, and that runs and locks of other users are refused."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from lorafit.errors import RunError
from lorafit.run_dir import RunDirectory
from lorafit.storage import ownership
from lorafit.storage.cache_dir import cache_folder
from lorafit.storage.locks import lock

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs POSIX permissions")


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        (0o700, ""),
        (0o755, ""),
        (0o1777, "written"),
        (0o777, "written"),
        (0o702, "written"),
        (0o720, "written"),
    ],
)
def test_a_mode_by_which_others_can_write(
    mode: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "_is_of_one_user", lambda _: False)
    tmp_path.chmod(mode)
    assert (reason in ownership.not_own(tmp_path)) if reason else ownership.not_own(tmp_path) == ""


def test_a_group_of_the_user_alone_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import grp
    import pwd

    tmp_path.chmod(0o770)
    mine = pwd.getpwuid(os.geteuid()).pw_name
    for name, reason in ((mine, ""), ("staff-of-a-lab", "can be written by other users")):
        monkeypatch.setattr(grp, "getgrgid", lambda _, name=name: grp.struct_group((name, "x", 0, [])))
        assert ownership.not_own(tmp_path) == reason


def test_a_file_system_without_modes_is_taken_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Windows disk under Linux shows every folder as open to all, and no command changes that."""
    tmp_path.chmod(0o777)
    assert ownership.not_own(tmp_path)
    monkeypatch.setattr(ownership, "_keeps_modes", lambda _: False)
    assert ownership.not_own(tmp_path) == ""


def test_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = os.geteuid() + 12345
    monkeypatch.setattr(ownership.os, "geteuid", lambda: other)
    assert ownership.not_own(tmp_path).startswith("belongs to user ")


def test_folders_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a" / "b" / "c"
    folder.mkdir(parents=True)
    assert ownership.not_safe_above(folder) == ""
    (tmp_path / "a").chmod(0o777)
    assert ownership.not_safe_above(folder) == f"`{tmp_path / 'a'}` can be written by other users"
    (tmp_path / "a").chmod(0o1777)
    assert ownership.not_safe_above(folder) == ""
    (tmp_path / "a").chmod(0o755)
    link = tmp_path / "open" / "link"
    link.parent.mkdir()
    link.parent.chmod(0o777)
    link.symlink_to(folder)
    assert "open" in ownership.not_safe_above(link / "d")
    monkeypatch.setattr(ownership.os, "geteuid", lambda: os.getuid() + 12345)
    assert "belongs to user" in ownership.not_safe_above(folder) or os.getuid() == 0


def test_the_cache_is_made_for_its_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "x" / "cache"))
    before = os.umask(0)
    try:
        (tmp_path / "x").mkdir(0o755)
        made = cache_folder("rows")
    finally:
        os.umask(before)
    assert [stat.S_IMODE(each.stat().st_mode) for each in (made, made.parent)] == [0o700, 0o700]


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_others_cannot_write_to_a_run_whatever_the_umask(umask: int, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "runs" / "one")
    before = os.umask(umask)
    try:
        run.create()
        with run.locked():
            run.write_json(run.rows_file, [1])
            run.checkpoints.mkdir()
        assert os.umask(umask) == umask  # as it was
    finally:
        os.umask(before)
    for path in (run.path, *run.path.iterdir()):
        assert not path.stat().st_mode & 0o022, path
        assert not path.stat().st_mode & umask & 0o055, path


@pytest.mark.parametrize("place", ["", "checkpoints", "run.lock"])
def test_a_run_that_others_can_write_is_refused(place: str, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.create()
    run.checkpoints.mkdir(0o755)
    with run.locked():
        pass
    open_to_all = run.path / place
    mode = stat.S_IMODE(open_to_all.stat().st_mode)
    open_to_all.chmod(mode | 0o022)
    with pytest.raises(RunError, match="can be written by other users") as caught, run.locked():
        pass
    [problem] = caught.value.problems
    assert problem.hint.startswith(f"`chmod go-w {open_to_all}`")
    open_to_all.chmod(mode)  # what the hint says
    with run.locked():
        pass


def test_a_run_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership.os, "geteuid", lambda: os.getuid() + 12345)
    with pytest.raises(RunError, match="belongs to user"), lock(tmp_path / "run.lock"):
        pass


def test_a_lock_of_ones_own_is_not_refused_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        for _ in range(2):
            with lock(tmp_path / "run.lock"):
                pass
    finally:
        os.umask(before)
