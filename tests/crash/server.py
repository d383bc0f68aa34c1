"""A fork server with all imports done. It forks a child per run, and can kill it, fail its calls or record them.

    python -m tests.crash.server MODULE

MODULE has `JOBS`: functions by name. Requests and answers are lines of JSON on stdin and stdout. A child runs
`JOBS[job](root, **arguments)` in the environment of the server, and the shim watches the files below `root`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType, TracebackType
from typing import Any, TypeVar

from tests.crash.shim import Injection, build, watch
from tests.prompts import Asked

T = TypeVar("T")
R = TypeVar("R")
TIMEOUT = 120.0  # seconds; a child that runs longer is an error


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a child: `killed` by SIGKILL, an `answer`, or a `fault` (a timeout or an exception)."""

    killed: bool
    answer: Mapping[str, Any] | None
    fault: str
    seconds: float


class Server(Asked):
    """The client of one server process; one child at a time."""

    def __init__(self, work: Path, module: str, *, prefix: Sequence[str] = (), **environment: str) -> None:
        variables = {
            "LD_PRELOAD": str(build(work)),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "LORAFIT_NATIVE": "0",
            "PYTHONWARNINGS": "ignore",
        }
        super().__init__(
            ["tests.crash.server", module],
            {**os.environ, **variables, **environment},
            prefix=prefix,
            log=work / f"{module}.err",
        )

    def run(
        self,
        job: str,
        root: Path,
        *,
        injection: Injection | None = None,
        kill_after: float | None = None,
        log: Path | None = None,
        learn: bool = False,
        timeout: float = TIMEOUT,
        **arguments: Any,
    ) -> Outcome:
        """Fork a child for `job`, with a fault at `injection`, or killed after `kill_after` seconds.

        Its calls are appended to `log`. With `learn`, the server also imports the modules of the child, so that
        later children start with them.
        """
        request = {
            "job": job,
            "root": str(root),
            "injection": asdict(injection or Injection()),
            "kill_after": kill_after,
            "log": str(log) if log else None,
            "learn": learn,
            "timeout": timeout,
            "arguments": arguments,
        }
        return Outcome(**self.ask(request))


class Servers:
    """Several servers for one list of trials. After `seconds` no trial is started, and `cut_short` is true."""

    def __init__(
        self,
        work: Path,
        module: str,
        count: int | None = None,
        seconds: float = math.inf,
        **environment: str,
    ) -> None:
        self.count = count or max(1, os.cpu_count() or 1)
        self.cut_short = False
        self._until = time.monotonic() + seconds
        self._all = [Server(work, module, **environment) for _ in range(self.count)]
        self._free: SimpleQueue[Server] = SimpleQueue()
        for server in self._all:
            self._free.put(server)

    def run(self, job: str, root: Path, **arguments: Any) -> Outcome:
        """`Server.run` on a free server."""
        server = self._free.get()
        try:
            return server.run(job, root, **arguments)
        finally:
            self._free.put(server)

    def learn(self, job: str, root: Path, **arguments: Any) -> Outcome:
        """Run `job` on every server, so that each imports all needed modules. Returns the last outcome."""
        for index, server in enumerate(self._all):
            outcome = server.run(job, root / f"rehearsal-{index}", learn=True, **arguments)
            assert not outcome.fault, outcome.fault
        return outcome

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Call `function` for every item, in parallel on all servers; the results have the order of the items."""
        running: deque[Future[R]] = deque()
        with ThreadPoolExecutor(self.count) as pool:
            for item in items:
                if time.monotonic() > self._until:
                    self.cut_short = True
                    break
                running.append(pool.submit(function, item))
                if len(running) > self.count:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()

    def __enter__(self) -> Servers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self._all:
            server.close()


def _serve(module: ModuleType) -> None:
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(2, 1)  # a job's own output goes to stderr
    for line in requests:
        outcome = _forked(module, json.loads(line))
        for name in (outcome["answer"] or {}).pop("modules", ()):
            with contextlib.suppress(Exception):
                import_module(name)
        tasks = [(task / "comm").read_text() for task in sorted(Path("/proc/self/task").iterdir())]
        # jemalloc_bg_thd belongs to pyarrow's allocator, which supports fork.
        others = [name for name in tasks[1:] if name != "jemalloc_bg_thd\n"]
        assert not others, f"the server must have no other threads: {others}"
        answers.write(json.dumps(outcome) + "\n")
        answers.flush()


def _forked(module: ModuleType, request: dict[str, Any]) -> dict[str, Any]:
    reading, writing = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if not child:
        os.close(reading)
        _work(module, request, writing)
    os.close(writing)
    limit = request["kill_after"]
    content, late = b"", False
    while True:
        rest = started + (limit or request["timeout"]) - time.monotonic()
        if not late and not select.select([reading], [], [], max(rest, 0))[0]:
            os.kill(child, signal.SIGKILL)
            late = True
        elif piece := os.read(reading, 65536):
            content += piece
        else:
            break
    os.close(reading)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    killed = status == -signal.SIGKILL and not (late and limit is None)
    answer = json.loads(content) if content and not killed else None
    fault = "" if killed or (answer and "traceback" not in answer) else f"status {status}"
    if answer and "traceback" in answer:
        fault = answer["traceback"]
    if late and limit is None:
        fault = f"still running after {request['timeout']} s"
    seconds = time.monotonic() - started
    return {"killed": killed, "answer": answer, "fault": fault, "seconds": seconds}


def _work(module: ModuleType, request: dict[str, Any], writing: int) -> None:
    try:
        try:
            log = request["log"] and Path(request["log"])
            watch(Path(request["root"]), log, Injection(**request["injection"]))
            answer = module.JOBS[request["job"]](Path(request["root"]), **request["arguments"])
            if request["learn"]:
                answer["modules"] = sorted(sys.modules.keys() - {"__main__"})
        except BaseException:
            answer = {"traceback": traceback.format_exc()}
        os.write(writing, json.dumps(answer).encode())
    finally:
        os._exit(0)


if __name__ == "__main__":
    _serve(import_module(sys.argv[1]))
