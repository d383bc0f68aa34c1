"""R3: simulates a power loss at every moment of a recorded run, and opens possible states of the disk."""

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
from tests.crash.shim import Call, Injection, read_log
from tests.crash.trial import Bench, Tally

from lorafit.errors import LorafitError
from lorafit.storage.atomic import verify_folder

_SAVED = re.compile(rb'"event": "saved", "step": (\d+)')
_STEP = re.compile(r"run/checkpoints/step-(\d+)")


@dataclass(slots=True)
class Expected:
    """The checkpoints that the run has reported as saved, and the folders that it has written."""

    saved: set[int] = field(default_factory=set)  # reported as saved, not removed by a rotation
    written: dict[str, list[dict[str, bytes]]] = field(default_factory=dict)  # folder -> files per commit

    def feed(self, call: Call, disk: Disk) -> None:
        """Record the effect of a call."""
        if call.path == "run/metrics.jsonl" and call.kind == "w":
            self.saved |= {int(step) for step in _SAVED.findall(call.data)}
        if call.kind == "r" and (_STEP.fullmatch(call.target) or call.target == "run/adapter"):
            self.written.setdefault(call.target, []).append(disk.files(call.target))


def replay(calls: Sequence[Call]) -> Iterator[tuple[int, Disk, Expected]]:
    """The moments of a recorded run, as (number of calls so far, disk, expected state)."""
    disk, expected = Disk(), Expected()
    yield 0, disk, expected
    for number, call in enumerate(calls, start=1):
        if call.kind == "r" and (removed := _STEP.fullmatch(call.path)) and "/.old-" not in call.target:
            expected.saved.discard(int(removed[1]))
        disk.feed(call)
        expected.feed(call, disk)
        yield number, disk, expected


def put(image: Image, folder: Path) -> None:
    """Replace `folder` by the contents of `image`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path, content in image.items():  # a folder precedes its contents
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)


def check_image(root: Path, expected: Expected) -> list[str]:
    """The problems when lorafit opens the image at `root`."""
    run, problems = run_of(root), []
    run.clean()  # a resume does this first
    for step in sorted(expected.saved):
        problems += [f"step {step} is lost: {fault}" for fault in verify_folder(run.checkpoint(step))[:1]]
    newest, _ = run.newest_checkpoint()
    if newest is not None and not _is_as_written(root, f"run/checkpoints/step-{newest:06d}", expected):
        problems.append(f"step {newest} is accepted, but differs from the written files")
    if run.has_adapter() and not _is_as_written(root, "run/adapter", expected):
        problems.append("the adapter is accepted, but differs from the written files")
    if expected.saved:
        try:
            run.config()
        except (LorafitError, OSError) as error:
            problems.append(f"config.yaml: {error}")
    return problems


def _is_as_written(root: Path, folder: str, expected: Expected) -> bool:
    files = {path.name: path.read_bytes() for path in (root / folder).iterdir()}
    return files in expected.written.get(folder, [])


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
    """Open the images of every `stride`-th moment from `first`; keep every `sample`-th image for a resume."""
    mutate(mutation)
    calls = list(read_log(Path(record), Path(recorded)))
    seen: set[str] = set()
    failures, kept = [], []
    for number, disk, expected in replay(calls):
        if number % stride != first:
            continue
        for image in disk.images(random.Random(number), per_moment):
            key = _digest(image, expected.saved)
            if key in seen:
                continue
            seen.add(key)
            put(image, root / "image")
            if problems := check_image(root / "image", expected):
                failures.append(f"after call {number} of {len(calls)}: {'; '.join(problems)}")
                if mutation:  # detected
                    return {"images": sorted(seen), "failures": failures, "kept": []}
            if len(seen) % sample == 0:
                kept.append(f"image-{number}-{len(seen)}")
                put(image, root / kept[-1])
    return {"images": sorted(seen), "failures": failures, "kept": kept}


def _digest(image: Image, saved: set[int]) -> str:
    digest = hashlib.sha256(repr(sorted(saved)).encode())
    for path in sorted(image):
        data = image[path]
        digest.update(f"{path}\0{-1 if data is None else len(data)}\0".encode() + (data or b""))
    return digest.hexdigest()


JOBS: Mapping[str, Any] = {**RUNS, "open_images": open_images}


History = float | Literal["undisturbed", "stopped"]


def record_of(bench: Bench, name: str, history: History) -> tuple[Path, Path]:
    """Record a complete run. Returns the record and the run's folder.

    A number: the run is killed after that part of its calls, and resumed. "stopped": SIGTERM arrives in a step with an
    evaluation, so that the resume replaces a checkpoint.
    """
    root, record = bench.root(name), bench.work / f"{name}.log"
    record.unlink(missing_ok=True)
    injection, stop_in = Injection(), 4 if history == "stopped" else None
    if isinstance(history, float):
        num_calls = sum(call.thread == 0 for call in calls_of_a_run(bench))
        injection = Injection(0, max(1, int(history * num_calls)), "kill")
    outcome = bench.run("start", root, log=record, injection=injection, stop_in=stop_in)
    if outcome.killed or (outcome.answer and not outcome.answer["finished"]):
        outcome = bench.run("resume", root, log=record)
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
    """Open the images of one record, a part on each server, and resume the sample."""
    num_parts = bench.servers.count

    def open_part(part: int) -> tuple[Path, dict[str, Any]]:
        root = bench.root(f"power-{part}")
        outcome = bench.servers.run(
            "open_images",
            root,
            timeout=3600.0,
            record=str(record),
            recorded=str(recorded),
            first=part * stride,
            stride=num_parts * stride,
            per_moment=per_moment,
            sample=sample,
            mutation=bench.mutation,
        )
        assert outcome.answer is not None, outcome.fault
        assert not outcome.fault, outcome.fault
        return root, dict(outcome.answer)

    opened = list(bench.servers.each(open_part, range(num_parts)))
    images = {key for _, answer in opened for key in answer["images"]}
    tally.tried += len(images)
    tally.failures += [failure for _, answer in opened for failure in answer["failures"]]
    kept = [root / name for root, answer in opened for name in answer["kept"]]
    for path, problems in zip(kept, bench.servers.each(bench.finish, kept), strict=False):
        tally.count("resumed to the end")
        tally.failures += [f"{path.name}: {problem}" for problem in problems]
