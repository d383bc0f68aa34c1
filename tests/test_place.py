"""Which process of a run this one is, and the word that an ended launch leaves for its restarts."""

from __future__ import annotations

from pathlib import Path

import pytest

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
    for environment in ({}, {"RANK": "1"}, {"WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}):
        assert Place.here(environment) == Place()
    assert Place().alone
    assert Place().first
    assert not Place().has_agent
    assert not Place.here(TORCHRUN).alone


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
