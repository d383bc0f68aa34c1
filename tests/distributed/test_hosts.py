"""Two hosts: network namespaces with an address each, an agent each, and a link between them that can be cut.

`make hosts` runs them: undisturbed, with the link cut for a while, and with one host killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.runs import events
from tests.tiny_models import write_model, write_rows

from lorafit.config.load import load_config
from lorafit.training.run import start_run

STEPS = 60
ADDRESSES = ("10.77.0.1", "10.77.0.2")
LONG = bool(os.environ.get("LORAFIT_LONG"))


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def can_make_hosts() -> str:
    """Why no host can be made here, empty where one can."""
    if shutil.which("ip") is None:
        return "needs the command `ip`"
    name = f"lorafit-probe-{os.getpid()}"
    try:
        ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        return f"may not make network namespaces: {error.stderr.decode().strip()}"
    ip("netns", "delete", name)
    return ""


REASON = can_make_hosts() if LONG else ""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not LONG, reason="takes minutes: `make hosts`"),
    pytest.mark.skipif(bool(REASON), reason=REASON),
]


class Hosts:
    """Two namespaces, joined by a veth pair; each runs torchrun's agent with one worker."""

    def __init__(self, folder: Path, words: list[str]) -> None:
        self.names = [f"lorafit-{os.getpid()}-{host}" for host in (0, 1)]
        self.folder, self.words = folder, words
        self.agents: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Hosts:
        ends = [f"lf{os.getpid() % 100000}-{host}" for host in (0, 1)]
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(self.names, ends, ADDRESSES, strict=True):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "link", "set", end, "name", "eth0")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        return self

    def start(self, host: int, *arguments: str) -> None:
        agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1"]
        agent += ["--rdzv-backend", "c10d", "--rdzv-id", "hosts", "--rdzv-endpoint", f"{ADDRESSES[0]}:29400"]
        agent += ["--rdzv-conf", f"is_host={1 - host},last_call_timeout=8,read_timeout=20"]
        agent += ["--local-addr", ADDRESSES[host], "--max-restarts", "5"]
        command = ["ip", "netns", "exec", self.names[host], *agent, "-m", "lorafit", "train", *self.words]
        environment = {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
            "GLOO_SOCKET_IFNAME": "eth0",
        }
        with (self.folder / f"host-{host}.log").open("a") as log:
            self.agents.append(
                subprocess.Popen(
                    [*command, *arguments],
                    env={**os.environ, **environment, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10"},
                    stdout=log,
                    stderr=log,
                    text=True,
                    start_new_session=True,
                )
            )

    def bytes_over_the_link(self) -> int:
        """Received and sent by the first host so far."""
        words = ["ip", "netns", "exec", self.names[0], "cat", "/proc/net/dev"]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        (line,) = [line.split() for line in said.splitlines() if "eth0:" in line]
        return int(line[1]) + int(line[9])

    def link(self, state: str) -> None:
        ip("-n", self.names[1], "link", "set", "eth0", state)

    def kill(self, host: int) -> None:
        """What a power cut does to a host: every process in it is gone at once."""
        found = subprocess.run(
            ["ip", "netns", "pids", self.names[host]], capture_output=True, text=True, check=True
        )
        for process in found.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)

    def wait(self, there: Callable[[], Any], seconds: float = 300) -> None:
        until = time.monotonic() + seconds
        while not there():
            assert time.monotonic() < until, self.said()
            time.sleep(0.02)

    def said(self) -> str:
        return "\n".join(path.read_text()[-4000:] for path in sorted(self.folder.glob("host-*.log")))

    def __exit__(self, *_: object) -> None:
        for host in (0, 1):
            self.kill(host)
        for agent in self.agents:
            agent.wait(30)
        for name in self.names:
            ip("netns", "delete", name)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("hosts")
    return [
        f"model.name={write_model(folder / 'model')}",
        f"data.path={write_rows(folder / 'rows.json', 60)}",
        "model.dtype=float32",
        "model.device=cpu",
        "train.batch_size=6",
        f"train.max_steps={STEPS}",
        "train.eval_every=30",
        "train.save_every=10",
        "lora.rank=64",
        "train.learning_rate=0.0005",
        "run.samples=0",
        "run.verify=false",
        "distributed.timeout=60",
    ]


@pytest.fixture(scope="module")
def one(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("one") / "run"
    return start_run(load_config(None, [*words, f"run.output={output}"]), quiet=True).path


@pytest.fixture
def hosts(words: list[str], tmp_path: Path) -> Iterator[Hosts]:
    with Hosts(tmp_path, words) as made:
        yield made


def last_step(run: Path) -> int:
    with contextlib.suppress(Exception):
        return max((event["step"] for event in events(run, "step")), default=0)
    return 0


def assert_same(run: Path, one: Path) -> None:
    assert [event["step"] for event in events(run, "step")] == list(range(1, STEPS + 1))
    losses, expected = ([event["loss"] for event in events(path, "step")] for path in (run, one))
    assert losses == pytest.approx(expected, rel=1e-5)
    weights, wanted = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (run, one))
    assert max(float((weights[name] - wanted[name]).abs().max()) for name in wanted) < 1e-5


def publish(run: Path, what: str, **figures: float) -> None:
    """One line for people: what happened and how long it took."""
    print(
        json.dumps({"hosts": what, "steps": last_step(run), **{k: round(v, 1) for k, v in figures.items()}})
    )


def test_two_hosts_compute_what_one_does(hosts: Hosts, one: Path, tmp_path: Path) -> None:
    run, started = tmp_path / "run", time.monotonic()
    for host in (0, 1):
        hosts.start(host, "--output", str(run))
    hosts.wait(lambda: all(agent.poll() is not None for agent in hosts.agents))
    assert [agent.returncode for agent in hosts.agents] == [0, 0], hosts.said()
    assert {event["ranks"] for event in events(run, "step")} == {2}
    assert_same(run, one)
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    adapter = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    travelled = hosts.bytes_over_the_link() / STEPS
    assert travelled == pytest.approx(2 * adapter, rel=0.15)  # with headers, the loss, and how the hosts met
    publish(
        run,
        "undisturbed",
        seconds=time.monotonic() - started,
        adapter_bytes=adapter,
        bytes_a_step_over_the_link=travelled,
    )


def test_a_host_that_is_cut_off_and_comes_back_goes_on(hosts: Hosts, one: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for host in (0, 1):
        hosts.start(host, "--output", str(run))
    hosts.wait(lambda: last_step(run) >= 15)
    hosts.link("down")
    cut = time.monotonic()
    time.sleep(1)
    at = last_step(run)
    time.sleep(9)
    assert last_step(run) == at  # nobody goes on alone
    hosts.link("up")
    hosts.wait(lambda: last_step(run) > at)
    waited = time.monotonic() - cut
    hosts.wait(lambda: all(agent.poll() is not None for agent in hosts.agents))
    assert [agent.returncode for agent in hosts.agents] == [0, 0], hosts.said()
    assert_same(run, one)
    publish(run, "link cut for 10 s", seconds_from_cut_to_next_step=waited)


def test_when_a_host_is_killed_the_other_goes_on_from_the_last_checkpoint(
    hosts: Hosts, one: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for host in (0, 1):
        hosts.start(host, "--output", str(run))
    hosts.wait(lambda: last_step(run) >= 15)
    hosts.kill(1)
    killed, at = time.monotonic(), last_step(run)
    hosts.wait(lambda: last_step(run) > at + 1 and events(run, "step")[-1]["ranks"] == 1)
    waited = time.monotonic() - killed
    hosts.wait(lambda: hosts.agents[0].poll() is not None)
    assert hosts.agents[0].returncode == 0, hosts.said()
    assert_same(run, one)
    publish(run, "one of two killed", seconds_until_beyond_where_it_was=waited)
