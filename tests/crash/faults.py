"""R4: fails every call that changes files, once and permanently; fills a real disk; then resumes the run."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.crash.kills import calls_of_a_run
from tests.crash.server import Outcome
from tests.crash.shim import Act, Call, Injection
from tests.crash.trial import Bench, RunState, Tally

SHORT_RUN = (
    "train.max_steps=6",
    "train.eval_every=3",
    "train.keep=1",
)  # three saves, two of them rotated away
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_BYTES = re.compile(r"\d[\d,.]* ?(bytes|[kKMGT]i?B)\b")


def injections(calls: Sequence[Call]) -> list[Injection]:
    """Each error at each call, once and permanently; each write truncated."""
    acts: tuple[Act, ...] = ("fail", "fail for good")
    chosen = []
    for call in calls:
        chosen += [Injection(call.thread, call.number, act, error) for error in ERRORS for act in acts]
        if call.kind == "w":
            chosen.append(Injection(call.thread, call.number, "shorten"))
    return chosen


def fail_calls(bench: Bench, every: int = 1, kinds: str = "") -> Tally:
    """R4 with injected errors of the operating system, at every `every`-th injection.

    `kinds` are letters of kinds of calls (see shim.cpp), by default all kinds.
    """
    tally = Tally()
    calls = [call for call in calls_of_a_run(bench) if not kinds or call.kind in kinds]
    tally.facts["calls that change files"] = len(calls)
    # of the threads that save; a cache that cannot be written is done without
    of_saves = [call for call in calls if call.thread and call.path.startswith("run")]
    syncs = {(call.thread, call.number) for call in of_saves if call.kind == "s"}

    def trial(injection: Injection) -> tuple[Injection, bool, list[str]]:
        root = bench.root(
            f"{injection.act}-{injection.error}-{injection.thread}-{injection.call}".replace(" ", "-")
        )
        outcome = bench.run("start", root, injection=injection)
        stopped, problems = after_fault(bench, root, outcome, injection.error)
        if (injection.thread, injection.call) in syncs and not stopped:
            problems.append("a sync of a save failed, but the run continued")
        return injection, stopped, problems

    chosen = injections(calls)[::every]
    random.Random(0).shuffle(chosen)  # with a time limit, the campaign is a random sample
    for injection, stopped, problems in bench.servers.each(trial, chosen):
        error = errno.errorcode.get(injection.error, "")
        name = f"{injection.act} {error} at call {injection.call} of thread {injection.thread}"
        tally.add(name, *problems)
        if bench.is_detected(tally):
            break
        tally.count("stopped with a message" if stopped else "continued to the same bytes")
    return tally


def after_fault(bench: Bench, root: Path, outcome: Outcome, error: int) -> tuple[bool, list[str]]:
    """Whether the run stopped, and the problems of its message, of its files and of the resumed run."""
    if outcome.fault or outcome.answer is None:
        return True, [f"it crashed: {outcome.fault}"]
    if outcome.answer["finished"]:
        problems = bench.end_of(root, outcome)
        shutil.rmtree(root, ignore_errors=True)
        return False, problems
    problems = message_faults(outcome.answer["problems"], root, error)
    state = RunState.of(root)
    if state.newest < state.reported:
        problems.append(f"the checkpoint of step {state.reported} is lost")
    return True, problems + bench.finish(root)


def message_faults(problems: Sequence[Sequence[str]], root: Path, error: int) -> list[str]:
    """The missing parts of a message about a failed call: cause, path, and for a full disk the needed bytes."""
    text = " ".join(text for problem in problems for text in problem)
    missing = []
    if os.strerror(error) not in text:
        missing.append("its cause")
    if str(root) not in text:
        missing.append("a path")
    if error in _FULL and not _BYTES.search(text):
        missing.append("the bytes needed")
    return [f"the message lacks {part}: {text}" for part in missing]


def mount_fault() -> str:
    """The reason why a small file system cannot be mounted, or ""."""
    if os.geteuid():
        return "only root can mount a small file system"
    try:
        with small_disk(64) as folder:
            return "" if folder.is_mount() else "mounting changed nothing"
    except subprocess.CalledProcessError as error:
        return f"mount: {error.stderr.decode(errors='replace').strip()}"
    except FileNotFoundError:
        return "the command mount is not available"


@contextmanager
def small_disk(kibibytes: int) -> Iterator[Path]:
    """Mount a file system of that size in memory."""
    folder = Path(tempfile.mkdtemp(prefix="lorafit-disk-"))
    try:
        _run("mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", folder)
        try:
            yield folder
        finally:
            _run("umount", folder)
    finally:
        folder.rmdir()


def _run(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], check=True, capture_output=True)


def fill_disks(bench: Bench, count: int) -> Tally:
    """R4 with real file systems of `count` sizes, from 8 KiB to sufficient. They are enlarged before the resume."""
    tally = Tally()
    whole = bench.root("whole")
    bench.run("start", whole)
    sufficient = sum(path.stat().st_blocks for path in whole.rglob("*")) // 2  # KiB

    def trial(size: int) -> tuple[int, bool, list[str]]:
        with small_disk(size) as folder:
            root = folder / "trial"
            root.mkdir()
            outcome = bench.run("start", root)
            unfinished = outcome.answer and not outcome.answer["finished"]
            if unfinished:
                _run("mount", "-o", f"remount,size={4 * sufficient}k", folder)
            return size, *after_fault(bench, root, outcome, errno.ENOSPC)

    for size, stopped, problems in bench.servers.each(trial, _spread(8, sufficient + 40, count)):
        tally.add(f"a disk of {size} KiB", *problems)
        tally.count("stopped with a message" if stopped else "continued to the same bytes")
    return tally


def _spread(least: int, most: int, count: int) -> list[int]:
    return [least + (most - least) * index // max(count - 1, 1) for index in range(count)]
