"""`python -m MODULE WORDS` forked from a process that has torch and lorafit imported: as fresh, seconds sooner.

For what must be a process but need not be a new interpreter: signals, ranks, an environment of its own. What a module
reads from the environment when it is imported, as huggingface_hub does, has its default here.
"""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from tests.waiting import HANGS

IMPORTED = ["lorafit.cli.main", "lorafit.training.run", "lorafit.plan.planner", "lorafit.verify.reload"]


@cache
def _server() -> ForkServerContext:
    """The process that forks; it ends with this one."""
    context = get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("HF_", "LORAFIT_"))]:
            patch.delenv(name)
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return context


class Forked:
    """`python -m module words`, as far as it is like a subprocess.Popen with two pipes; ends with its block."""

    def __init__(
        self, module: str, *words: str, env: Mapping[str, str] = os.environ, cwd: Path | None = None
    ) -> None:
        self.args = [module, *words]
        self._folder = Path(tempfile.mkdtemp(prefix="forked-"))
        self._streams = [self._folder / "out", self._folder / "err"]
        for stream in self._streams:
            stream.touch()
        arguments = (self.args, dict(env), str(cwd or Path.cwd()), [str(path) for path in self._streams])
        self._process = _server().Process(target=_work, args=arguments)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        if self.returncode is None:
            self.returncode = self._process.exitcode
        return self.returncode

    def communicate(self, timeout: float = HANGS) -> tuple[str, str]:
        """Wait for the end; returns what it has said on stdout and stderr."""
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        out, err = (path.read_text(encoding="utf-8") for path in self._streams)
        return out, err

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it now, where it still runs."""
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._process.join()
        self.poll()
        self._process.close()
        shutil.rmtree(self._folder)


def run(
    module: str, *words: str, env: Mapping[str, str] = os.environ, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """`python -m module words` to its end."""
    with Forked(module, *words, env=env, cwd=cwd) as process:
        out, err = process.communicate()
        assert process.returncode is not None
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def _work(args: Sequence[str], environment: Mapping[str, str], folder: str, streams: Sequence[str]) -> None:
    """In the child."""
    for number, stream in enumerate(streams, 1):
        descriptor = os.open(stream, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = list(args)
    runpy.run_module(args[0], run_name="__main__", alter_sys=True)
