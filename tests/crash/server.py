"""A process that has everything imported and forks a child for each run; a child can be killed, struck, recorded.

    python -m tests.crash.server MODULE

MODULE has `JOBS`: functions by name. Requests and answers are lines of JSON on stdin and stdout. What a child does:
`JOBS[job](**arguments)`, in the environment of the server, with the shim armed for the files below `root`.
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

from tests.crash.shim import Strike, build, watch
from tests.prompts import Asked

T = TypeVar("T")
R = TypeVar("R")
TIMEOUT = 120.0  # seconds after which a child counts as hanging


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a child ended: `killed` by SIGKILL, or with an `answer`, or, when it hung or broke, with a `fault`."""

    killed: bool
    answer: Mapping[str, Any] | None
    fault: str
    seconds: float


class Server(Asked):
    """The client's end: one server process, one child at a time."""

    def __init__(self, work: Path, module: str, *, prefix: Sequence[str] = (), **environment: str) -> None:
        own = {
            "LD_PRELOAD": str(build(work)),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "LORAFIT_NATIVE": "0",
            "PYTHONWARNINGS": "ignore",
        }
        super().__init__(
            ["tests.crash.server", module],
            {**os.environ, **own, **environment},
            prefix=prefix,
            log=work / f"{module}.err",
        )

    def run(
        self,
        job: str,
        root: Path,
        *,
        strike: Strike | None = None,
        kill_after: float | None = None,
        log: Path | None = None,
        learn: bool = False,
        timeout: float = TIMEOUT,
        **arguments: Any,
    ) -> Outcome:
        """Fork a child for `job`. It dies at `strike`, or `kill_after` seconds; its calls are appended to `log`.

        With `learn` the server imports what the child had imported, so that later children start with it.
        """
        request = {
            "job": job,
            "root": str(root),
            "strike": asdict(strike or Strike()),
            "kill_after": kill_after,
            "log": str(log) if log else None,
            "learn": learn,
            "timeout": timeout,
            "arguments": arguments,
        }
        return Outcome(**self.ask(request))


class Servers:
    """Several servers that share the work; after `seconds` no more of it is begun, and `cut_short` says so."""

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
        """As `Server.run`, on whichever is free."""
        server = self._free.get()
        try:
            return server.run(job, root, **arguments)
        finally:
            self._free.put(server)

    def learn(self, job: str, root: Path, **arguments: Any) -> Outcome:
        """Run `job` on every server, so that each has imported all that it needs; the last outcome."""
        for index, server in enumerate(self._all):
            outcome = server.run(job, root / f"rehearsal-{index}", learn=True, **arguments)
            assert not outcome.fault, outcome.fault
        return outcome

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """`function` of every item, as many at once as there are servers; results in the order of the items."""
        begun: deque[Future[R]] = deque()
        with ThreadPoolExecutor(self.count) as pool:
            for item in items:
                if time.monotonic() > self._until:
                    self.cut_short = True
                    break
                begun.append(pool.submit(function, item))
                if len(begun) > self.count:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()

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
    os.dup2(2, 1)  # what a job prints is no answer
    for line in requests:
        outcome = _forked(module, json.loads(line))
        for name in (outcome["answer"] or {}).pop("modules", ()):
            with contextlib.suppress(Exception):
                import_module(name)
        tasks = [(task / "comm").read_text() for task in sorted(Path("/proc/self/task").iterdir())]
        others = [name for name in tasks[1:] if name != "jemalloc_bg_thd\n"]  # pyarrow's; it knows forks
        assert not others, f"a process with threads is not forked: {others}"
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
            watch(Path(request["root"]), log, Strike(**request["strike"]))
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
