"""`lorafit train --nproc`: torch's agent, workers that are stopped, killed and frozen, and a run that goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.command import COMMAND
from tests.forked import Forked
from tests.runs import events, tiny_settings
from tests.waiting import HANGS, until

from lorafit.config.load import load_config
from lorafit.run_dir import RunDirectory
from lorafit.training.run import start_run

STEPS = 200
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds workers by /proc"),
]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tiny_settings(
        tmp_path_factory.mktemp("agent"),
        f"train.max_steps={STEPS}",
        "train.learning_rate=0.0002",  # ranks add up in another order: at a higher rate that shows after 200 steps
        "train.eval_every=30",
        "train.save_every=10",
        f"distributed.timeout={HANGS}",
        "run.verify=true",
        num_rows=60,
    )


@contextmanager
def lorafit(*words: str) -> Iterator[Forked]:
    """The agent; its workers are new interpreters."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with Forked("lorafit", *words, env=environment) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()  # it ends its workers
            process.communicate(timeout=HANGS)


def wait_for(there: Callable[[], Any], process: Forked) -> Any:
    try:
        return until(there, process.poll)
    except AssertionError as error:
        process.kill()
        raise AssertionError(process.communicate()[1]) from error


def last_step(run: Path) -> int:
    try:
        return max((event["step"] for event in events(run, "step")), default=0)
    except Exception:
        return 0


def num_starts(run: Path) -> int:
    try:
        return len(events(run, "run_started"))
    except Exception:
        return 0


def worker(agent: int, rank: int) -> int | None:
    """The process of a rank below the agent."""
    for folder in Path("/proc").iterdir():
        try:
            if not folder.name.isdigit():
                continue
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            words = (folder / "environ").read_bytes().split(b"\0")
            if parent == agent and f"RANK={rank}".encode() in words:
                return int(folder.name)
        except (OSError, IndexError):
            continue
    return None


def is_alive(process: int) -> bool:
    """Whether a process runs; one that has ended may stay in the table."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_stopped_killed_and_frozen_a_run_of_two_comes_to_the_end_of_a_run_of_one(
    settings: list[str], tmp_path: Path
) -> None:
    whole = start_run(load_config(None, [*settings, f"run.output={tmp_path / 'one'}"]), quiet=True)
    run = tmp_path / "two"
    begun = time.monotonic()
    with lorafit("train", "--nproc", "2", *settings, "--output", str(run)) as agent:
        wait_for(lambda: last_step(run) >= 5, agent)
        # A frozen rank is waited for in earnest: longer than this machine takes to start two ranks.
        patience = max(20.0, 2 * (time.monotonic() - begun))
        agent.send_signal(signal.SIGTERM)
        _, said = agent.communicate(timeout=HANGS)
        assert agent.returncode == 130, said
    (stopped,) = [event for event in events(run, "saved") if event["reason"] == "stopped"]
    assert RunDirectory.open(run).newest_checkpoint() == (stopped["step"], {})
    assert "Traceback" not in said

    words = ("--resume", str(run), "--nproc", "2", f"distributed.timeout={patience}")
    with lorafit("train", *words) as agent:
        wait_for(lambda: num_starts(run) == 2 and last_step(run) > stopped["step"] + 10, agent)
        os.kill(worker(agent.pid, 1), signal.SIGKILL)
        wait_for(
            lambda: num_starts(run) == 3 and last_step(run) > stopped["step"] + 10, agent
        )  # started again
        frozen = worker(agent.pid, 1)
        os.kill(frozen, signal.SIGSTOP)
        try:
            wait_for((run / "heartbeat.json").exists, agent)
        finally:
            os.kill(frozen, signal.SIGCONT)
        out, said = agent.communicate(timeout=HANGS)
        assert agent.returncode == 0, said
    assert out.strip() == str(run / "adapter")
    verdict = json.loads((run / "heartbeat.json").read_text())
    assert list(verdict["stands_still"]) == ["1"]
    assert f"process {frozen}" in verdict["stands_still"]["1"]
    assert verdict["stands_still"]["1"] in said

    assert [event["step"] for event in events(run, "step")] == list(range(1, STEPS + 1))
    losses, expected = ([event["loss"] for event in events(path, "step")] for path in (run, whole.path))
    assert losses == pytest.approx(expected, rel=1e-5)
    weights, wanted = (load_file(p / "adapter" / "adapter_model.safetensors") for p in (run, whole.path))
    assert all(float((weights[name] - wanted[name]).abs().max()) < 1e-5 for name in wanted)


def test_a_hangup_that_nohup_ignores_reaches_neither_the_agent_nor_the_workers(
    settings: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ["train", "--nproc", "2", *settings, "train.max_steps=20", "--output", str(run)]
    shell = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *COMMAND, *words]
    with subprocess.Popen(shell, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as agent:
        try:
            until(lambda: last_step(run) >= 2, agent.poll)
            for process in (agent.pid, worker(agent.pid, 0)):
                os.kill(process, signal.SIGHUP)
            output, _ = agent.communicate(timeout=HANGS)
        finally:
            agent.terminate()  # it ends its workers
    assert (agent.returncode, last_step(run)) == (0, 20), output


def test_a_mistake_is_said_once_and_not_tried_again(settings: list[str], tmp_path: Path) -> None:
    broken = tmp_path / "rows.json"
    broken.write_text('[{"instruction": "a"}]')
    words = ["train", "--nproc", "2", *settings, f"data.path={broken}", "--output", str(tmp_path / "run")]
    with lorafit(*words) as agent:
        _, said = agent.communicate(timeout=HANGS)
    assert agent.returncode == 2
    assert said.count("error:") == 1, said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_ranks_whose_agent_is_killed_save_and_end(settings: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with lorafit("train", "--nproc", "2", *settings, "train.max_steps=100000", "--output", str(run)) as agent:
        wait_for(lambda: last_step(run) >= 5, agent)
        ranks = [worker(agent.pid, rank) for rank in (0, 1)]
        agent.kill()
        until(lambda: not any(rank and is_alive(rank) for rank in ranks))
    assert all(ranks)
    (saved,) = [event["step"] for event in events(run, "saved") if event["reason"] == "stopped"]
    assert RunDirectory.open(run).newest_checkpoint() == (saved, {})
    assert last_step(run) == saved
