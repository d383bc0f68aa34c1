"""Which rank is stuck: the report from two readings of all heartbeats, and the thread that makes it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

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


def test_the_thread_names_the_lost_rank_within_its_time_out_and_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[int] = []

    def end(code: int) -> None:
        ended.append(code)
        raise dist.DistError("as if the process were gone")

    monkeypatch.setattr("lorafit.distributed.watchdog.os._exit", end)
    store = dist.HashStore()
    store.set("beat/1", json.dumps(sign(1, 2, COMPUTING)))
    file = tmp_path / "heartbeat.json"
    started = time.monotonic()
    with Heartbeat(store, 0, 2, timeout=1.5, file=file) as heartbeat:
        heartbeat.at(2, SHARING)
        while not ended and time.monotonic() - started < 20:
            time.sleep(0.05)
    assert ended == [1]
    verdict = json.loads(file.read_text())
    assert list(verdict["stands_still"]) == ["1"]
    assert verdict["ranks"][0]["phase"] == "all-reducing gradients"
    assert "rank 1 (process 4711 on node-7, step 2" in capsys.readouterr().err


def test_training_that_goes_on_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafit.distributed.watchdog.os._exit", lambda code: pytest.fail("ended"))
    with Heartbeat(dist.HashStore(), 0, 2, timeout=0.6, file=tmp_path / "heartbeat.json") as heartbeat:
        for step in range(12):
            heartbeat.at(step, BETWEEN)
            time.sleep(0.1)
    assert not (tmp_path / "heartbeat.json").exists()
