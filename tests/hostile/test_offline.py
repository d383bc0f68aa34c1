"""With `run.offline` and folders on this machine nothing looks up a name or connects, where there is no network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.hostile.server import OFFLINE, isolated
from tests.tiny_models import write_model, write_rows
from tests.waiting import HANGS

WITHOUT_NETWORK = isolated()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not WITHOUT_NETWORK, reason="this system gives no network namespace (unshare)"),
]
SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY = ("model.dtype=float32", "model.device=cpu", "lora.rank=2", "run.offline=true")
# In every Python process, children included: Unix sockets are no network.
HOOK = """
import os, socket, sys
def hook(event, arguments):
    if event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        if event in ("socket.connect", "socket.bind") and isinstance(arguments[1], (str, bytes)):
            return
        with open(os.environ["SEEN"], "a") as file:
            file.write(f"{event} {arguments[1:]}\\n")
sys.addaudithook(hook)
with open(os.environ["SEEN"] + ".started", "a") as file:
    file.write(" ".join(sys.argv[:1]) + "\\n")
"""

# Commands in one process after another, forked after the imports.
EACH = """
import json, os, sys
import lorafit.training.run
from lorafit.cli.main import main
for words in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        sys.argv = ["lorafit", *words]
        sys.exit(main())
    if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        sys.exit(code)
"""


class Cage:
    """Commands in a network namespace without any route; what they ask of the network is in `seen`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "seen"
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(HOOK)
        inherited = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        path = os.pathsep.join([str(folder / "site"), *filter(None, sys.path)])
        own = {"HOME": str(folder), "LORAFIT_CACHE": str(folder / "cache"), "SEEN": str(self.log)}
        self.environment = {**inherited, **OFFLINE, **own, "PYTHONPATH": path}

    def python(self, *words: object) -> subprocess.CompletedProcess[str]:
        command = [*WITHOUT_NETWORK, sys.executable, *map(str, words)]
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=HANGS,
            check=False,
        )

    @property
    def seen(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    @property
    def num_processes(self) -> int:
        return len(Path(f"{self.log}.started").read_text().splitlines())


def test_train_resume_generate_and_export_ask_nothing_of_the_network(tmp_path: Path) -> None:
    model, rows = write_model(tmp_path / "model", **SHAPE), write_rows(tmp_path / "rows.json", 8)
    cage, run = Cage(tmp_path), tmp_path / "run"
    words = ("--model", model, "--data", rows, *TINY, "train.max_steps=3", "train.save_every=1")
    done = cage.python("-m", "lorafit", "train", *words, "--output", run)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(max((run / "checkpoints").iterdir()))  # as after a kill in the last step
    commands = (
        ("train", "--resume", str(run)),
        ("generate", str(run), "hi", "--max-tokens", "2", "--offline"),
        ("export", str(run), "adapter", "--no-verify", "--offline"),
    )
    done = cage.python("-c", EACH, json.dumps(commands))
    assert done.returncode == 0, done.stderr
    assert cage.num_processes == 4, "the proof's own process is watched, too"
    assert cage.seen == []


@pytest.mark.parametrize(
    "act",
    [
        "socket.getaddrinfo('example.org', 443)",
        "socket.gethostbyname('example.org')",
        "socket.create_connection(('192.0.2.1', 443), 1)",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
    ],
)
def test_a_look_up_is_seen_and_comes_to_nothing(act: str, tmp_path: Path) -> None:
    cage = Cage(tmp_path)
    words = f"[sys.executable, '-c', {f'import socket; {act}'!r}]"
    child = f"import subprocess, sys; sys.exit(subprocess.run({words}).returncode)"
    done = cage.python("-c", child)
    assert done.returncode != 0
    assert cage.seen
