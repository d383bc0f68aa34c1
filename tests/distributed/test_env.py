"""Which process of a run this one is, and the word that an ended launch leaves for its restarts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorafit.distributed.env import ProcessEnv, exit_code_of_previous_attempt, mark_no_restart
from lorafit.errors import RunError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "TORCHELASTIC_RUN_ID": "job/7",
    "TORCHELASTIC_RESTART_COUNT": "2",
}


def test_a_place_is_read_from_what_torchrun_sets_and_alone_without_it() -> None:
    assert ProcessEnv.read(TORCHRUN) == ProcessEnv(5, 8, 1, 4, "job/7", 2)
    for environment in ({}, {"RANK": "1"}, {"WORLD_SIZE": "2"}):
        assert ProcessEnv.read(environment) == ProcessEnv()
    assert ProcessEnv().is_single_process
    assert ProcessEnv().is_main
    assert not ProcessEnv().has_agent
    assert not ProcessEnv.read(TORCHRUN).is_single_process


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
@pytest.mark.parametrize("value", ["x", "", "-1", "1.5"])
def test_what_is_no_number_is_named_with_all_others(name: str, value: str) -> None:
    with pytest.raises(RunError) as caught:
        ProcessEnv.read({**TORCHRUN, name: value, "TORCHELASTIC_RESTART_COUNT": "often"})
    first, second = caught.value.problems
    assert f"{name}={value} is" in first.message
    assert "TORCHELASTIC_RESTART_COUNT=often" in second.message


def test_a_rank_beyond_the_world_is_refused_by_the_command_line() -> None:
    with pytest.raises(RunError, match="RANK=8 of WORLD_SIZE=8"):
        ProcessEnv.read({**TORCHRUN, "RANK": "8"})
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "lorafit", "--version"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.splitlines()[0]) == (
        2,
        "error: WORLD_SIZE=0 is no whole number from 1",
    )


def test_what_ended_for_good_ends_its_restarts_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path))
    first, again = (
        ProcessEnv.read({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": count}) for count in ("0", "1")
    )
    assert exit_code_of_previous_attempt(again) is None
    mark_no_restart(first, 2)
    assert exit_code_of_previous_attempt(again) == 2
    assert (
        exit_code_of_previous_attempt(
            ProcessEnv.read({**TORCHRUN, "TORCHELASTIC_RUN_ID": "other", "RANK": "1"})
        )
        is None
    )
    assert exit_code_of_previous_attempt(first) is None  # a new launch of that name begins anew
    assert exit_code_of_previous_attempt(again) is None


def test_a_process_alone_leaves_no_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path))
    mark_no_restart(ProcessEnv(), 2)
    assert list(tmp_path.iterdir()) == []
    assert exit_code_of_previous_attempt(ProcessEnv()) is None
