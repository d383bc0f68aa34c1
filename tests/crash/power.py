"""R3: the power goes at every moment of a recorded run, and every state that the disk may then have is opened."""

from __future__ import annotations

import hashlib
import random
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.crash.disk import Disk, Image
from tests.crash.jobs import JOBS as RUNS
from tests.crash.jobs import run_of
from tests.crash.kills import calls_of_a_run
from tests.crash.mutations import mutate
from tests.crash.shim import Call, Strike, read_log
from tests.crash.trial import Bench, Tally

from lorafit.errors import LorafitError
from lorafit.storage.atomic import verify_folder

_SAVED = re.compile(rb'"event": "saved", "step": (\d+)')
_STEP = re.compile(r"run/checkpoints/step-(\d+)")


@dataclass(slots=True)
class Promises:
    """What the run has said so far, and what it wrote."""

    due: set[int] = field(default_factory=set)  # steps reported as saved that no rotation has begun to remove
    written: dict[str, list[dict[str, bytes]]] = field(default_factory=dict)  # folder -> its files, each time

    def feed(self, call: Call, disk: Disk) -> None:
        """Take note of a call that is about to happen (removals) or has (the rest)."""
        if call.path == "run/metrics.jsonl" and call.kind == "w":
            self.due |= {int(step) for step in _SAVED.findall(call.data)}
        if call.kind == "r" and (_STEP.fullmatch(call.target) or call.target == "run/adapter"):
            self.written.setdefault(call.target, []).append(disk.files(call.target))


def replay(calls: Sequence[Call]) -> Iterator[tuple[int, Disk, Promises]]:
    """The moments of a recorded run: (number of calls made, disk, promises), from none to all."""
    disk, promises = Disk(), Promises()
    yield 0, disk, promises
    for number, call in enumerate(calls, start=1):
        if call.kind == "r" and (gone := _STEP.fullmatch(call.path)) and "/.old-" not in call.target:
            promises.due.discard(int(gone[1]))
        disk.feed(call)
        promises.feed(call, disk)
        yield number, disk, promises


def put(image: Image, folder: Path) -> None:
    """Make `folder` what `image` says."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path, content in image.items():  # a folder comes before what is in it
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)


def judge(root: Path, promises: Promises) -> list[str]:
    """What is wrong with what lorafit makes of an image that lies at `root`."""
    run, problems = run_of(root), []
    run.clean()  # as a resume does first
    for step in sorted(promises.due):
        problems += [f"step {step} is lost: {fault}" for fault in verify_folder(run.checkpoint(step))[:1]]
    newest, _ = run.newest_checkpoint()
    if newest is not None and not _is_as_written(root, f"run/checkpoints/step-{newest:06d}", promises):
        problems.append(f"step {newest} is accepted and is not what was written")
    if run.has_adapter() and not _is_as_written(root, "run/adapter", promises):
        problems.append("the adapter is accepted and is not what was written")
    if promises.due:
        try:
            run.config()
        except (LorafitError, OSError) as error:
            problems.append(f"config.yaml: {error}")
    return problems


def _is_as_written(root: Path, folder: str, promises: Promises) -> bool:
    files = {path.name: path.read_bytes() for path in (root / folder).iterdir()}
    return files in promises.written.get(folder, [])


def open_images(
    root: Path,
    record: str,
    recorded: str,
    first: int,
    stride: int,
    per_moment: int,
    sample: int,
    mutation: str = "",
) -> dict[str, Any]:
    """A child's share: every `stride`-th moment from `first`; every `sample`-th image stays, to be resumed."""
    mutate(mutation)
    calls = list(read_log(Path(record), Path(recorded)))
    seen: set[str] = set()
    failures, kept = [], []
    for number, disk, promises in replay(calls):
        if number % stride != first:
            continue
        for image in disk.images(random.Random(number), per_moment):
            key = _digest(image, promises.due)
            if key in seen:
                continue
            seen.add(key)
            put(image, root / "image")
            if problems := judge(root / "image", promises):
                failures.append(f"after call {number} of {len(calls)}: {'; '.join(problems)}")
            if len(seen) % sample == 0:
                kept.append(f"image-{number}-{len(seen)}")
                put(image, root / kept[-1])
    return {"images": sorted(seen), "failures": failures, "kept": kept}


def _digest(image: Image, due: set[int]) -> str:
    digest = hashlib.sha256(repr(sorted(due)).encode())
    for path in sorted(image):
        data = image[path]
        digest.update(f"{path}\0{-1 if data is None else len(data)}\0".encode() + (data or b""))
    return digest.hexdigest()


JOBS: Mapping[str, Any] = {**RUNS, "open_images": open_images}


History = float | Literal["undisturbed", "stopped"]


def record_of(bench: Bench, name: str, history: History) -> tuple[Path, Path]:
    """Record a run to its end; the record and the folder it was in.

    A number: killed after that share of its calls, and resumed. "stopped": by SIGTERM in a step that is to be measured,
    so that the resume replaces a checkpoint.
    """
    root, record = bench.root(name), bench.work / f"{name}.log"
    record.unlink(missing_ok=True)
    strike, stop_in = Strike(), 4 if history == "stopped" else None
    if isinstance(history, float):
        num_calls = sum(call.thread == 0 for call in calls_of_a_run(bench))
        strike = Strike(0, max(1, int(history * num_calls)), "kill")
    outcome = bench.run("start", root, log=record, strike=strike, stop_in=stop_in)
    if outcome.killed or (outcome.answer and not outcome.answer["finished"]):
        outcome = bench.run("go_on", root, log=record)
    assert not bench.end_of(root, outcome), bench.end_of(root, outcome)
    return record, root


def cut_the_power(
    bench: Bench, histories: Sequence[History], per_moment: int, sample: int, stride: int = 1
) -> Tally:
    """R3 on every `stride`-th moment of recorded `histories` (see `record_of`), with up to `per_moment` images.

    Every `sample`-th image is resumed to the end.
    """
    tally = Tally()
    for index, history in enumerate(histories):
        if bench.servers.cut_short:
            break
        record, root = record_of(bench, f"history-{index}", history)
        tally.count("moments", 1 + len(list(read_log(record, root))) // stride)
        open_all(bench, tally, record, root, per_moment, sample, stride)
    return tally


def open_all(
    bench: Bench, tally: Tally, record: Path, recorded: Path, per_moment: int, sample: int, stride: int
) -> None:
    """Open the images of one record, a share on each server, and resume the sample."""
    shares = bench.servers.count

    def open_share(share: int) -> tuple[Path, dict[str, Any]]:
        root = bench.root(f"power-{share}")
        outcome = bench.servers.run(
            "open_images",
            root,
            timeout=3600.0,
            record=str(record),
            recorded=str(recorded),
            first=share * stride,
            stride=shares * stride,
            per_moment=per_moment,
            sample=sample,
            mutation=bench.mutation,
        )
        assert outcome.answer is not None, outcome.fault
        assert not outcome.fault, outcome.fault
        return root, dict(outcome.answer)

    opened = list(bench.servers.each(open_share, range(shares)))
    images = {key for _, answer in opened for key in answer["images"]}
    tally.tried += len(images)
    tally.failures += [failure for _, answer in opened for failure in answer["failures"]]
    kept = [root / name for root, answer in opened for name in answer["kept"]]
    for path, problems in zip(kept, bench.servers.each(bench.finish, kept), strict=False):
        tally.count("resumed to the end")
        tally.failures += [f"{path.name}: {problem}" for problem in problems]
