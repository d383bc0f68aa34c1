"""Which process of a run this one is, and the word that an ended launch leaves for its restarts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorafit.errors import RunError
from lorafit.place import Place, ended_before, ended_for_good

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "TORCHELASTIC_RUN_ID": "job/7",
    "TORCHELASTIC_RESTART_COUNT": "2",
}


def test_a_place_is_read_from_what_torchrun_sets_and_alone_without_it() -> None:
    assert Place.here(TORCHRUN) == Place(5, 8, 1, 4, "job/7", 2)
    for environment in ({}, {"RANK": "1"}, {"WORLD_SIZE": "2"}):
        assert Place.here(environment) == Place()
    assert Place().alone
    assert Place().first
    assert not Place().has_agent
    assert not Place.here(TORCHRUN).alone


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
@pytest.mark.parametrize("value", ["x", "", "-1", "1.5"])
def test_what_is_no_number_is_named_with_all_others(name: str, value: str) -> None:
    with pytest.raises(RunError) as caught:
        Place.here({**TORCHRUN, name: value, "TORCHELASTIC_RESTART_COUNT": "often"})
    first, second = caught.value.problems
    assert f"{name}={value} is" in first.message
    assert "TORCHELASTIC_RESTART_COUNT=often" in second.message


def test_a_rank_beyond_the_world_is_refused_by_the_command_line() -> None:
    with pytest.raises(RunError, match="RANK=8 of WORLD_SIZE=8"):
        Place.here({**TORCHRUN, "RANK": "8"})
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
    first, again = (Place.here({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": count}) for count in ("0", "1"))
    assert ended_before(again) is None
    ended_for_good(first, 2)
    assert ended_before(again) == 2
    assert ended_before(Place.here({**TORCHRUN, "TORCHELASTIC_RUN_ID": "other", "RANK": "1"})) is None
    assert ended_before(first) is None  # a new launch of that name begins anew
    assert ended_before(again) is None


def test_a_process_alone_leaves_no_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path))
    ended_for_good(Place(), 2)
    assert list(tmp_path.iterdir()) == []
    assert ended_before(Place()) is None
