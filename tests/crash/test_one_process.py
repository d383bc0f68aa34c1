"""A run belongs to one process: random sequences of what people and programs do to the folder of a run that trains."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.crash.folders import FOLDER_ACTIONS, MOVED, PROCESS_ACTIONS, SETTINGS, SLOTS, Place
from tests.runs import tiny_settings

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="folders in use cannot be moved")]
ACTIONS = st.tuples(st.sampled_from(FOLDER_ACTIONS), st.just(0)) | st.tuples(
    st.sampled_from(PROCESS_ACTIONS), st.integers(0, SLOTS - 1)
)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tiny_settings(tmp_path_factory.mktemp("material"), *SETTINGS)


@pytest.fixture
def place(tmp_path: Path, words: list[str]) -> Iterator[Place]:
    made = Place(tmp_path, words)
    yield made
    made.close()
    made.check()


@pytest.mark.parametrize("change", FOLDER_ACTIONS)
@pytest.mark.parametrize("then", ["start", "nothing"])
def test_a_run_whose_folder_is_taken_away_ends_with_one_line(place: Place, change: str, then: str) -> None:
    for action in ("start", "step", "step", "step"):
        place.act(action, 0)
    assert place.saved
    place.act(change, 0)
    if then == "start":
        place.act("start", 1)
        place.act("step", 1)
    place.act("step", 0)
    if change in ("symlink", "move back"):  # it is the same folder
        assert not any(MOVED in end for end in place.ends)
    else:
        (line,) = [end for end in place.ends if MOVED in end]
        assert line.startswith(f"error: {MOVED}\n")
    assert place.path.exists() == (then == "start" or change not in ("remove", "move"))


@settings(max_examples=6, deadline=None)
@given(actions=st.lists(ACTIONS, min_size=4, max_size=14))
def test_what_is_saved_stays_and_no_folder_holds_two_runs(words: list[str], actions: list[Any]) -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        place = Place(Path(name), words)
        try:
            for action, slot in [("start", 0), ("step", 0), ("step", 0), *actions]:
                place.act(action, slot)
        finally:
            place.close()
        place.check()
