"""A run that lasts: closed terminals, clocks set back, and nothing that grows over thousands of steps."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.runs import digest, events, tiny_run
from tests.waiting import until

from lorafit.model.memory import resident_bytes
from lorafit.run_dir import RunDirectory
from lorafit.training import loop
from lorafit.training.run import resume_run

pytestmark = pytest.mark.slow

LONG = "LORAFIT_LONG" in os.environ


@pytest.fixture(scope="module")
def material(tiny: list[str]) -> list[str]:
    return [*tiny, "train.batch_size=2", "lora.rank=2"]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_handles_and_memory_stay_flat(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10,000 steps with LORAFIT_LONG=1, else 300; a checkpoint and a measurement every 20."""
    steps = 10_000 if LONG else 300
    handles: list[int] = []
    memory: list[int] = []
    gradients = loop._gradients

    def watched(job: loop.TrainContext, state: Any, *rest: Any) -> Any:
        handles.append(len(list(Path("/proc/self/fd").iterdir())))
        memory.append(resident_bytes())
        return gradients(job, state, *rest)

    monkeypatch.setattr(loop, "_gradients", watched)
    tiny_run(
        material, tmp_path / "run", f"train.max_steps={steps}", "train.save_every=20", "train.eval_every=20"
    )
    # What leaks is never given back, so it lifts the least of a window; a save under way only the most.
    quarter = steps // 4
    early, late = slice(quarter, 2 * quarter), slice(3 * quarter, None)
    assert min(handles[late]) <= min(handles[early]) + 2
    assert min(memory[late]) - min(memory[early]) < 24e6


def test_a_clock_that_is_set_back_changes_nothing(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny_run(material, tmp_path / "whole", "train.max_steps=6")
    now = [time.time()]

    def backwards() -> float:
        now[0] -= 3600
        return now[0]

    with monkeypatch.context() as patch:
        patch.setattr(time, "time", backwards)
        result = tiny_run(material, tmp_path / "run", "train.max_steps=6", "train.save_every=1")
    assert digest(result) == digest(whole)
    assert all(event["seconds"] >= 0 for event in events(result, "step"))
    for step in RunDirectory.open(result.path).saved_steps():
        os.utime(
            RunDirectory.open(result.path).checkpoint(step), (0, 10**9 - step)
        )  # the newest looks oldest
    assert RunDirectory.open(result.path).newest_checkpoint()[0] == 6


@pytest.mark.skipif(sys.platform != "linux", reason="needs a Linux terminal")
def test_a_closed_terminal_saves_and_the_run_resumes(material: list[str], tmp_path: Path) -> None:
    import pty
    import warnings

    words = [*material, "train.max_steps=40", "train.learning_rate=0.01", "lora.dropout=0.1"]
    whole = tiny_run(words, tmp_path / "whole")
    output = tmp_path / "run"
    command = [sys.executable, "-m", "lorafit", "train", *words, f"run.output={output}"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads: the child only execs
        child, terminal = pty.fork()
    if child == 0:
        os.execv(command[0], command)
    metrics = output / "metrics.jsonl"
    os.set_blocking(terminal, False)

    def has_begun() -> bool:
        with contextlib.suppress(BlockingIOError):
            os.read(terminal, 65536)
        return metrics.exists() and b'"event": "step"' in metrics.read_bytes()

    until(has_begun)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 130)  # 0: it had already ended
    if code == 130:
        assert RunDirectory.open(output).newest_checkpoint()[0] is not None
    assert digest(resume_run(output, quiet=True)) == digest(whole)
