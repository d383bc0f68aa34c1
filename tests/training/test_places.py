"""Where runs are: their own folders when several start at once, and their use from any folder."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from tests.command import Cli
from tests.runs import interrupt_after, tiny_run, tiny_settings
from tests.tiny_models import write_rows

from lorafit.config.load import load_config, with_absolute_paths
from lorafit.errors import DataError, RunError
from lorafit.run_dir import RunDirectory
from lorafit.training.run import start_run

# Each process finds the names of runs that all start in one second.
NAMES = """
import sys
from datetime import datetime
from lorafit import run_dir
class Clock:
    @staticmethod
    def now():
        return datetime(2026, 1, 2, 3, 4, 5)
run_dir.datetime = Clock
for _ in range(20):
    print(run_dir.RunDirectory.new(None, "owner/a model").path)
"""


def test_runs_that_start_in_the_same_second_have_folders_of_their_own(tmp_path: Path) -> None:
    started = [
        subprocess.Popen([sys.executable, "-c", NAMES], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    names = [line for process in started for line in process.communicate()[0].splitlines()]
    first = "runs/a-model-20260102-030405"
    assert sorted(names) == sorted([first, *(f"{first}-{number}" for number in range(2, 81))])
    assert all((tmp_path / name).is_dir() for name in names)


def test_a_run_that_does_not_begin_leaves_no_folder_of_its_own_and_removes_none_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = tiny_settings(tmp_path, "data.max_length=8")
    with pytest.raises(DataError):
        start_run(load_config(None, settings), quiet=True)
    assert list(Path("runs").iterdir()) == []
    Path("given").mkdir()
    with pytest.raises(DataError):
        start_run(load_config(None, [*settings, "run.output=given"]), quiet=True)
    assert Path("given").is_dir()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_an_error_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o500)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="cannot make the run directory: Permission denied"):
        RunDirectory.new(None, "model")


def test_a_file_in_the_place_of_the_folder_of_runs_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").touch()
    with pytest.raises(RunError, match="cannot make the run directory: File exists"):
        RunDirectory.new(None, "model")


def test_a_disk_that_is_full_from_the_beginning_is_told_the_bytes_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    settings = tiny_settings(tmp_path, f"run.output={tmp_path / 'run'}")
    monkeypatch.setattr("lorafit.run_dir.make_folder", full)
    with pytest.raises(RunError, match=r"No space left on device \([\d,]{5,} bytes are needed\)"):
        start_run(load_config(None, settings), quiet=True)


def test_only_what_exists_here_becomes_an_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("model", "chat", "owner/adapter", "자료"):
        Path(name).mkdir(parents=True)
    Path("rows.json").touch()
    Path("own.jinja").touch()
    words = ["model.name=model", "lora.init_from=owner/adapter", "data.template=own.jinja"]
    config = load_config(None, [*words, "data.path=[rows.json, 자료, owner/rows, '자료/*.json']"])
    found = with_absolute_paths(config)
    here = Path.cwd()
    assert (found.model.name, found.lora.init_from) == (f"{here}/model", f"{here}/owner/adapter")
    assert found.data.path == (f"{here}/rows.json", f"{here}/자료", "owner/rows", f"{here}/자료/*.json")
    assert found.data.template == f"{here}/own.jinja"
    named = load_config(None, ["model.name=owner/model", "data.path=owner/rows", "data.template=chat"])
    assert with_absolute_paths(named) == named


@pytest.mark.slow
def test_a_run_of_relative_paths_is_used_from_another_folder_and_after_it_was_moved(
    tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, elsewhere = tmp_path / "여기", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    settings = tiny_settings(here, "train.max_steps=4", "train.save_every=2", "data.holdout=4")
    write_rows(here / "rows.json", 40)
    monkeypatch.chdir(here)
    words = ["--model", "model", "--data", "rows.json", "--output", "run", *settings[2:]]
    with monkeypatch.context() as patch:
        interrupt_after(3, patch)
        assert cli("train", *words).code == 130
    monkeypatch.chdir(elsewhere)
    done = cli("train", "--resume", "../여기/run")
    assert done.code == 0, done.err
    commands = (
        ["generate", "RUN", "Hi", "--max-tokens", 2],
        ["generate", "RUN/adapter", "Hi", "--max-tokens", 2],
        ["report", "RUN"],
        ["eval", "RUN"],
        ["export", "RUN", "adapter", "--output", "OUT"],
        ["train", "--resume", "RUN"],
    )
    for run in ("../여기/run", "moved"):
        if run == "moved":
            shutil.move(here / "run", "moved")
        for command in commands:
            done = cli(
                *(str(w).replace("RUN", run).replace("OUT", f"{tmp_path}/of-{run[-3:]}") for w in command)
            )
            assert done.code == 0, (command, done.err)


@pytest.mark.parametrize(("umask", "modes"), [(0o077, {0o700, 0o600}), (0o022, {0o755, 0o644})])
def test_the_files_of_a_run_are_as_open_as_the_umask_says(
    umask: int, modes: set[int], tiny: list[str], tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        run = tiny_run(tiny, tmp_path / "run", "train.max_steps=1", "run.samples=1").path
    finally:
        os.umask(before)
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in (run, *run.rglob("*"))}
    assert (run / "samples.json") in found
    assert {path: oct(mode) for path, mode in found.items() if mode not in modes} == {}
