"""A process that has lorafit imported and forks a child for each command line; the child is watched and capped.

    python -m tests.hostile.server

Requests and answers are lines of JSON on stdin and stdout. A child may write below `allowed` only; whatever else it
writes, every connection, look-up, process and unpickled class is reported. Memory and processor time have a limit.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.prompts import Asked

MEMORY = 2 << 30  # bytes of address space beyond what the server has
SECONDS, PATIENCE = 200, 1200  # of processor time, and of any, until it counts as hanging
FORBIDDEN = (
    "socket.connect",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "socket.gethostbyaddr",
    "socket.bind",
    "socket.sendto",
    "socket.sendmsg",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "pty.spawn",
    "pickle.find_class",
    "webbrowser.open",
)
WRITES = (
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
)
FOLLOWING = ("os.truncate", "os.chmod", "os.chown")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
OFFLINE = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "LORAFIT_NATIVE": "0",
    "PYTHONWARNINGS": "ignore",
    "NO_COLOR": "1",
    "COLUMNS": "200",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command line ended. `acts` are what it must not do; it took `seconds` of processor time, and `megabytes`
    beyond those of the server.
    """

    code: int
    out: str
    err: str
    acts: Sequence[str]
    seconds: float
    megabytes: int


class Server(Asked):
    """The client's end; where the system allows it, the server is in a network without any route."""

    def __init__(
        self, *, environment: Mapping[str, str] = os.environ, network: bool = False, careless: bool = False
    ) -> None:
        """`network`: with this machine's; `careless`: what is shown keeps its secrets, to see that it is noticed."""
        super().__init__(
            ["tests.hostile.server", *(["careless"] if careless else [])],
            {**environment, **OFFLINE},
            prefix=[] if network else isolated(),
        )

    def run(
        self, words: Sequence[str], folder: Path, allowed: Iterable[Path], stdin: Path | None = None
    ) -> Outcome:
        """`lorafit *words` in `folder`, with a file as standard input."""
        request = {
            "words": [os.fsencode(word).hex() for word in words],
            "folder": str(folder),
            "allowed": [str(path) for path in allowed],
            "stdin": str(stdin or os.devnull),
        }
        return Outcome(**self.ask(request))

    def interrupt(self) -> None:
        """Ctrl-C for the command that is running."""
        process = self._process.pid
        for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
            os.kill(int(child), signal.SIGINT)


def isolated() -> list[str]:
    """The words that put a command into a network namespace of its own, [] where that is not allowed."""
    words = ["unshare", "--map-root-user", "--net"]
    if (
        shutil.which("unshare")
        and not subprocess.run([*words, "true"], capture_output=True, check=False).returncode
    ):
        return words
    return []


def _serve() -> None:
    import tests.hostile.studio_pages  # noqa: F401 (each child has it)
    import torch

    import lorafit.cli.main
    import lorafit.infer.model
    import lorafit.plan.planner
    import lorafit.training.run

    if "careless" in sys.argv:
        import lorafit.redact

        lorafit.redact._secrets = lambda: iter(())
        lorafit.redact._TOKEN = lorafit.redact._LOGIN_IN_URL = re.compile("(?!)")
    torch.set_num_threads(1)
    # What their first use does once and for all: torch makes a folder of its own, platform asks `uname`.
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]).step()
    platform.platform()
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in requests:
        answers.write(json.dumps(_forked(json.loads(line))) + "\n")
        answers.flush()


def _forked(request: dict[str, Any]) -> dict[str, Any]:
    folder = Path(request["folder"])
    child = os.fork()
    if not child:
        _work(request)
    _, status, usage = os.wait4(child, 0)
    report = folder / ".report"
    found = json.loads(report.read_text()) if report.exists() else {"acts": ["it ended without a word"]}
    for name in (".report", ".out", ".err"):
        found[name[1:]] = (folder / name).read_text(errors="replace") if (folder / name).exists() else ""
        (folder / name).unlink(missing_ok=True)
    return {
        "code": os.waitstatus_to_exitcode(status),
        "out": found["out"],
        "err": found["err"],
        "acts": found["acts"],
        "seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "megabytes": usage.ru_maxrss // 1024 - resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def _work(request: dict[str, Any]) -> None:
    folder = Path(request["folder"])
    code: Any = 99
    acts: list[str] = []
    try:
        os.chdir(folder)
        for number, name, flags in (
            (0, request["stdin"], os.O_RDONLY),
            (1, ".out", os.O_WRONLY | os.O_CREAT),
            (2, ".err", os.O_WRONLY | os.O_CREAT),
        ):
            os.dup2(os.open(name, flags), number)
        sys.stdin, sys.stdout, sys.stderr = (
            io.TextIOWrapper(
                io.FileIO(number, mode), encoding="utf-8", errors=errors, write_through=number > 0
            )
            for number, mode, errors in ((0, "r", "strict"), (1, "w", "strict"), (2, "w", "backslashreplace"))
        )
        sys.argv = ["lorafit", *(os.fsdecode(bytes.fromhex(word)) for word in request["words"])]
        os.environ.update(
            LORAFIT_CACHE=str(folder / "cache"), HF_HOME=str(folder / "cache" / "hf"), HOME=str(folder)
        )
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.alarm(PATIENCE)
        _watch([Path(path) for path in request["allowed"]], acts)
        if sys.argv[1:2] == ["studio"]:  # it would listen: its pages are asked for in this process
            from tests.hostile.studio_pages import main
        else:
            from lorafit.cli.main import main
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            acts.append("")  # what follows is ours
            (folder / ".report").write_text(json.dumps({"acts": acts[: acts.index("")]}))
        finally:
            os._exit(code)


def _watch(allowed: list[Path], acts: list[str]) -> None:
    """Note every act in `acts` that is none of a reader's."""
    roots = tuple(os.path.realpath(path) + os.sep for path in allowed)

    def inside(path: object, followed: bool) -> bool:
        if isinstance(path, int):
            return True
        name = os.fsdecode(path)  # type: ignore[arg-type]
        folder, last = os.path.split(name.rstrip(os.sep))
        real = os.path.realpath(name) if followed else f"{os.path.realpath(folder)}{os.sep}{last}"
        return real == os.devnull or (real + os.sep).startswith(roots)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FORBIDDEN:
            acts.append(f"{event} {str(arguments)[:200]}")
        elif event == "open":
            path, _, flags = arguments
            if flags & WRITING and not inside(path, followed=not flags & os.O_NOFOLLOW):
                acts.append(f"opened for writing: {path}")
        elif event in WRITES:
            paths = {"os.rename": arguments[:2], "os.link": arguments[:2], "os.symlink": arguments[1:2]}
            if not all(inside(path, followed=event in FOLLOWING) for path in paths.get(event, arguments[:1])):
                acts.append(f"{event} {str(arguments)[:200]}")

    sys.addaudithook(hook)


if __name__ == "__main__":
    _serve()
