"""R5: damages every byte of a checkpoint and of an adapter; removes, truncates, exchanges and replaces files."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from tests.crash.jobs import run_of
from tests.crash.kills import calls_of_a_run
from tests.crash.shim import Call, Injection
from tests.crash.trial import Bench, RunState, Tally

from lorafit.errors import RunError
from lorafit.run_dir import RunDirectory

Damage = Callable[[Path, Path], None]  # damages the first folder; the second is the previous checkpoint


def interrupted(bench: Bench, name: str) -> Path:
    """A run that was killed during the export: it has at least two checkpoints and no adapter."""
    calls = calls_of_a_run(bench)
    exported = next(call for call in calls if call.path.startswith("run/.staging-adapter"))
    root = bench.root(name)
    outcome = bench.run("start", root, injection=Injection(exported.thread, exported.number, "kill"))
    assert outcome.killed
    assert len(run_of(root).saved_steps()) >= 2
    return root


def flip_bits(bench: Bench, every: int = 1) -> Tally:
    """Flip a bit of every `every`-th byte. The previous checkpoint must be used, and the adapter must be rejected."""
    tally = Tally()
    run = run_of(interrupted(bench, "flipped"))
    *_, before, newest = run.saved_steps()
    for path, offset, name in flipped(run.checkpoint(newest), every):
        if run.newest_checkpoint()[0] != before:
            tally.failures.append(f"{name}: {path.name} byte {offset}")
        tally.tried += 1
    whole = bench.root("whole")
    bench.run("start", whole)
    finished = run_of(whole)
    for path, offset, name in flipped(finished.adapter, every):
        if not refuses_adapter(finished):
            tally.failures.append(f"{name}: {path.name} byte {offset}")
        tally.tried += 1
    return tally


def refuses_adapter(run: RunDirectory) -> bool:
    """Whether both resume and generate reject the final adapter."""
    try:
        run.newest_adapter()
    except RunError:
        return not run.has_adapter()
    return False


def flipped(folder: Path, every: int) -> Iterator[tuple[Path, int, str]]:
    """Yield each `every`-th byte of each file with one bit flipped; afterwards restore the byte."""
    count = 0
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        with path.open("r+b", buffering=0) as file:
            for offset, byte in enumerate(content):
                count += 1
                if count % every:
                    continue
                os.pwrite(file.fileno(), bytes([byte ^ 1 << count // every % 8]), offset)
                yield path, offset, folder.name
                os.pwrite(file.fileno(), bytes([byte]), offset)
        assert path.read_bytes() == content


def corrupt_writes(bench: Bench, every: int = 1) -> Tally:
    """Flip a bit in a write of a save or of the export. It must be detected at once, and nothing else may be lost."""
    tally = Tally()
    saved = re.compile(r"/\.staging-(step|adapter)")
    writes = [call for call in calls_of_a_run(bench) if call.kind == "w" and saved.search(call.path)]

    def trial(call: Call) -> tuple[Call, list[str]]:
        root = bench.root(f"corrupt-{call.thread}-{call.number}")
        outcome = bench.run("start", root, injection=Injection(call.thread, call.number, "corrupt"))
        if outcome.answer is None:
            return call, [f"it crashed: {outcome.fault}"]
        if outcome.answer["finished"]:
            return call, ["the damage was not detected"]
        problems = (
            []
            if "does not read back" in str(outcome.answer["problems"])
            else ["the message does not name the cause"]
        )
        state = RunState.of(root)
        if state.newest < state.reported:
            problems.append(f"the checkpoint of step {state.reported} is lost")
        return call, problems + bench.finish(root)

    for call, problems in bench.servers.each(trial, writes[::every]):
        tally.add(f"a write to {call.path}", *problems)
        if bench.is_detected(tally):
            break
    return tally


def damages(folder: Path) -> Iterator[tuple[str, Damage]]:
    """Names and functions of the damages to a checkpoint folder."""
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        size = (folder / name).stat().st_size
        yield f"without {name}", lambda new, _, name=name: (new / name).unlink()
        yield f"{name} of the previous step", lambda new, old, name=name: _copy(old / name, new / name)
        yield f"{name} with an additional byte", lambda new, _, name=name: _append(new / name)
        yield f"{name} with zeros", lambda new, _, name=name: _zero(new / name)
        for sixteenths in range(16):
            length = size * sixteenths // 16
            yield (
                f"{name} truncated to {length}",
                lambda new, _, name=name, n=length: os.truncate(new / name, n),
            )
    for one, other in pairwise(names):
        yield f"{one} and {other} exchanged", lambda new, _, a=one, b=other: _exchange(new / a, new / b)
    yield "an additional file", lambda new, _: _copy(new / names[0], new / "more.bin")
    yield "all of the previous step", lambda new, old: _replace(old, new)
    yield "empty", lambda new, _: [path.unlink() for path in new.iterdir()] and None


def damage_files(bench: Bench, sample: int = 1) -> Tally:
    """Damage the newest checkpoint. The previous one must be used; each `sample`-th time the run is resumed."""
    tally = Tally()
    origin = interrupted(bench, "origin")
    *_, before, newest = run_of(origin).saved_steps()

    whole = _contents(run_of(origin).checkpoint(newest))

    def trial(item: tuple[int, tuple[str, Damage]]) -> tuple[str, bool, list[str] | None]:
        number, (name, damage) = item
        with _copied(bench, origin, f"damage-{number}") as root:
            run = run_of(root)
            damage(run.checkpoint(newest), run.checkpoint(before))
            if _contents(run.checkpoint(newest)) == whole:  # the damage changes nothing
                return name, False, None
            step, skipped = run.newest_checkpoint()
            problems = [] if step == before else [f"step {step} was used and not {before}"]
            problems += [] if skipped else ["no message"]
            if resumed := not problems and number % sample == 0:
                problems += bench.finish(root)
            return name, resumed, problems

    for name, resumed, problems in bench.servers.each(
        trial, enumerate(damages(run_of(origin).checkpoint(newest)))
    ):
        if problems is not None:
            tally.add(name, *problems)
            tally.count("resumed to the end", resumed)
    return tally


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextmanager
def _copied(bench: Bench, origin: Path, name: str) -> Iterator[Path]:
    root = bench.root(name)
    shutil.copytree(origin, root, dirs_exist_ok=True)
    yield root
    shutil.rmtree(root, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes())


def _append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _exchange(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def _replace(old: Path, new: Path) -> None:
    shutil.rmtree(new)
    shutil.copytree(old, new)
