"""Which rank is stuck: the report from two readings of all heartbeats, and the thread that makes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from tests.waiting import HANGS, Clock, until

from lorafit.distributed.env import ProcessEnv
from lorafit.distributed.ranks import Ranks
from lorafit.distributed.watchdog import BETWEEN, COMPUTING, SHARING, Heartbeat, standing_still


def sign(beats: int, step: int, phase: int) -> dict[str, Any]:
    return {"beats": beats, "step": step, "phase": phase, "host": "node-7", "process": 4711}


def test_a_rank_whose_sign_does_not_change_is_frozen_whatever_step_it_is_in() -> None:
    before = [sign(3, 9, SHARING), sign(3, 9, SHARING), None]
    now = [sign(5, 9, SHARING), sign(3, 9, SHARING), None]
    found = standing_still(before, now)
    assert found[1] == ("rank 1 (process 4711 on node-7, step 9, all-reducing gradients) does not respond")
    assert found[2] == "rank 2 (no heartbeat yet) does not respond"
    assert list(found) == [1, 2]


def test_among_the_living_the_one_behind_holds_up_the_others() -> None:
    before = [sign(3, 9, SHARING), sign(3, 9, COMPUTING), sign(3, 9, SHARING)]
    now = [{**one, "beats": 5} for one in before]
    assert list(standing_still(before, now)) == [1]
    assert "is stuck; the other ranks wait" in standing_still(before, now)[1]


def two_ranks(store: dist.Store) -> Ranks:
    return Ranks(ProcessEnv(world_size=2), store)


class Ended:
    """The end of training, in the place of the event that the thread waits for; meanwhile `between` happens."""

    def __init__(self, clock: Clock, between: Callable[[], bool]) -> None:
        self._clock, self._between = clock, between

    def wait(self, seconds: float) -> bool:
        self._clock.now += seconds
        return self._between()


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[int]]:
    """The work of the first rank's thread on a clock of its own; exit codes of the process."""
    clock, codes = Clock(), []

    def end(code: int) -> None:
        codes.append(code)
        raise dist.DistError("as if the process were gone")

    monkeypatch.setattr("lorafit.distributed.watchdog.time", clock)
    monkeypatch.setattr("lorafit.distributed.watchdog.os._exit", end)

    def work(store: dist.Store, seconds_per_step: float, num_steps: int) -> list[int]:
        heartbeat = Heartbeat(two_ranks(store), timeout=10.0, file=tmp_path / "heartbeat.json")
        step, next_step = 1, clock.now + seconds_per_step

        def train() -> bool:
            nonlocal step, next_step
            if clock.now >= next_step:
                step, next_step = step + 1, clock.now + seconds_per_step
                heartbeat.at(step, SHARING)
            return step > num_steps

        heartbeat.at(step, SHARING)
        monkeypatch.setattr(heartbeat, "_ended", Ended(clock, train))
        heartbeat._watch()
        return codes

    return work


def test_a_lost_rank_is_named_within_the_time_out_and_the_process_ends(
    watch: Callable[..., list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = dist.HashStore()
    store.set("beat/1", json.dumps(sign(1, 1, COMPUTING)))
    assert watch(store, seconds_per_step=10.0, num_steps=5) == [1]
    verdict = json.loads((tmp_path / "heartbeat.json").read_text())
    assert list(verdict["stands_still"]) == ["1"]
    assert verdict["ranks"][0]["phase"] == "all-reducing gradients"
    assert "rank 1 (process 4711 on node-7, step 1" in capsys.readouterr().err


def test_training_that_goes_on_is_left_alone(watch: Callable[..., list[int]], tmp_path: Path) -> None:
    assert watch(dist.HashStore(), seconds_per_step=5.0, num_steps=12) == []
    assert not (tmp_path / "heartbeat.json").exists()


def test_the_thread_watches_until_the_end_of_the_block(tmp_path: Path) -> None:
    store = dist.HashStore()
    with Heartbeat(two_ranks(store), timeout=HANGS, file=tmp_path / "heartbeat.json") as heartbeat:
        heartbeat.at(3, BETWEEN)
        until(lambda: store.check(["beat/0"]))
    assert not heartbeat._thread.is_alive()
    assert not (tmp_path / "heartbeat.json").exists()
