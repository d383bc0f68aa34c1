"""R4: every call that changes files fails, once and for good, and a real disk is full; then the run is resumed."""

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
from tests.crash.shim import Act, Call, Strike
from tests.crash.trial import Bench, Left, Tally

SHORT_RUN = (
    "train.max_steps=6",
    "train.eval_every=3",
    "train.keep=1",
)  # three saves, two of them rotated away
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_BYTES = re.compile(r"\d[\d,.]* ?(bytes|[kKMGT]i?B)\b")


def strikes(calls: Sequence[Call]) -> list[Strike]:
    """Each error at each call, once and for good; each write cut short."""
    acts: tuple[Act, ...] = ("fail", "fail for good")
    found = []
    for call in calls:
        found += [Strike(call.thread, call.number, act, error) for error in ERRORS for act in acts]
        if call.kind == "w":
            found.append(Strike(call.thread, call.number, "shorten"))
    return found


def fail_calls(bench: Bench, every: int = 1, kinds: str = "") -> Tally:
    """R4 with errors that the operating system is made to give, at every `every`-th of the strikes.

    `kinds` are letters of calls (see shim.cpp); all by default.
    """
    tally = Tally()
    calls = [call for call in calls_of_a_run(bench) if not kinds or call.kind in kinds]
    tally.facts["calls that change files"] = len(calls)
    syncs = {(call.thread, call.number) for call in calls if call.kind == "s" and call.thread}

    def trial(strike: Strike) -> tuple[Strike, bool, list[str]]:
        root = bench.root(f"{strike.act}-{strike.error}-{strike.thread}-{strike.call}".replace(" ", "-"))
        outcome = bench.run("start", root, strike=strike)
        stopped, problems = after_fault(bench, root, outcome, strike.error)
        if (strike.thread, strike.call) in syncs and not stopped:
            problems.append("a sync of a save failed and it went on")
        return strike, stopped, problems

    chosen = strikes(calls)[::every]
    random.Random(0).shuffle(chosen)  # one that is cut short is a sample
    for strike, stopped, problems in bench.servers.each(trial, chosen):
        name = f"{strike.act} {errno.errorcode.get(strike.error, '')} at call {strike.call} of thread {strike.thread}"
        tally.add(name, *problems)
        tally.count("stopped with a message" if stopped else "went on to the same bytes")
    return tally


def after_fault(bench: Bench, root: Path, outcome: Outcome, error: int) -> tuple[bool, list[str]]:
    """Whether the run stopped, and what is wrong: with its message, with what is left, with how it then goes on."""
    if outcome.fault or outcome.answer is None:
        return True, [f"it broke: {outcome.fault}"]
    if outcome.answer["finished"]:
        problems = bench.end_of(root, outcome)
        shutil.rmtree(root, ignore_errors=True)
        return False, problems
    problems = message_faults(outcome.answer["problems"], root, error)
    left = Left.by(root)
    if left.newest < left.reported:
        problems.append(f"the checkpoint of step {left.reported} is gone")
    return True, problems + bench.finish(root)


def message_faults(problems: Sequence[Sequence[str]], root: Path, error: int) -> list[str]:
    """What a message about a failed call lacks: its cause, a path, and for a full disk how many bytes are needed."""
    text = " ".join(part for problem in problems for part in problem)
    lacks = []
    if os.strerror(error) not in text:
        lacks.append("its cause")
    if str(root) not in text:
        lacks.append("a path")
    if error in _FULL and not _BYTES.search(text):
        lacks.append("the bytes needed")
    return [f"the message lacks {what}: {text}" for what in lacks]


def mount_fault() -> str:
    """Why no small file system can be mounted here; "" where one can."""
    if os.geteuid():
        return "only root may mount a small file system"
    try:
        with small_disk(64) as folder:
            return "" if folder.is_mount() else "mounting changed nothing"
    except subprocess.CalledProcessError as error:
        return f"mount: {error.stderr.decode(errors='replace').strip()}"
    except FileNotFoundError:
        return "there is no mount command"


@contextmanager
def small_disk(kibibytes: int) -> Iterator[Path]:
    """A file system of that size in memory."""
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
    """R4 with real file systems of `count` sizes, from almost nothing to almost enough, made larger afterwards."""
    tally = Tally()
    whole = bench.root("whole")
    bench.run("start", whole)
    enough = sum(path.stat().st_blocks for path in whole.rglob("*")) // 2  # KiB

    def trial(size: int) -> tuple[int, bool, list[str]]:
        with small_disk(size) as folder:
            root = folder / "trial"
            root.mkdir()
            outcome = bench.run("start", root)
            left = outcome.answer and not outcome.answer["finished"]
            if left:
                _run("mount", "-o", f"remount,size={4 * enough}k", folder)
            return size, *after_fault(bench, root, outcome, errno.ENOSPC)

    for size, stopped, problems in bench.servers.each(trial, _spread(8, enough + 40, count)):
        tally.add(f"a disk of {size} KiB", *problems)
        tally.count("stopped with a message" if stopped else "went on to the same bytes")
    return tally


def _spread(least: int, most: int, count: int) -> list[int]:
    return [least + (most - least) * index // max(count - 1, 1) for index in range(count)]
