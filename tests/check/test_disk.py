"""A run that could not save is refused before its first step; one with little room says how much it needs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.command import Cli
from tests.runs import digest, events, tiny_run, tiny_settings

from lorafit.check import disk
from lorafit.errors import LorafitError


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    return tiny_settings(tmp_path, "train.max_steps=4", "train.save_every=2")


def with_free(num_bytes: int, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """All disks have `num_bytes` free; returns the folders that were asked for."""
    usage, asked = shutil.disk_usage("/"), list[Path]()

    def disk_usage(folder: Path) -> object:
        asked.append(folder)
        return usage._replace(free=num_bytes)

    monkeypatch.setattr(disk.shutil, "disk_usage", disk_usage)
    return asked


def test_a_run_that_cannot_save_is_refused_before_it_begins(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = with_free(1000, monkeypatch)
    with pytest.raises(LorafitError, match="disk: up to 3 checkpoints of .* none fits") as caught:
        tiny_run(settings, tmp_path / "new" / "run")
    (problem,) = caught.value.problems
    assert problem.place == str(tmp_path)
    assert "--output" in problem.hint
    assert asked == [tmp_path]
    assert not (tmp_path / "new").exists()


def test_with_run_check_warn_it_begins(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(1000, monkeypatch)
    result = tiny_run(settings, tmp_path / "run", "run.check=warn")
    assert any(event["text"].startswith("disk: ") for event in events(result, "note"))


def test_what_is_said_to_be_needed_is_what_a_run_takes(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = tiny_run(settings, tmp_path / "run")
    assert not any(event["text"].startswith("disk: ") for event in events(result, "note"))
    weights = sum(file.stat().st_size for file in (result.path / "checkpoints").rglob("*.safetensors"))
    weights += sum(file.stat().st_size for file in result.adapter.glob("*.safetensors"))
    with_free(weights // 2, monkeypatch)
    warned = tiny_run(settings, tmp_path / "warned")
    (text,) = [event["text"] for event in events(warned, "note") if event["text"].startswith("disk: ")]
    assert "not enough for all" in text
    assert digest(warned) == digest(result)


def test_check_lists_it(
    settings: list[str], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = cli("check", *settings)
    assert found.code == 0, found.err
    assert "\npass  disk " in found.out
    with_free(1000, monkeypatch)
    found = cli("check", *settings)
    assert found.code == 2
    assert "\nfail  disk " in found.out


def test_no_result_where_the_disk_does_not_answer(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(folder: Path) -> None:
        raise OSError

    monkeypatch.setattr(disk.shutil, "disk_usage", silent)
    result = tiny_run(settings, tmp_path / "run")
    assert "disk" not in (result.path / "check.json").read_text()
