"""Every hostile file x everything that reads it: refused in one clear line, and nothing else happens."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.hostile import adapters, gguf_files, models, names, prompts, recipes, rows, runs, templates
from tests.hostile.case import Case, Place
from tests.hostile.readers import ASK, LIKE, MORE_READERS, PATIENT, READERS, SETTINGS, SHOWING, TELLING
from tests.hostile.server import Outcome, Server
from tests.tiny_models import write_model, write_rows

KINDS = {
    "recipe": recipes.CASES,
    "data": {**rows.CASES, **names.ROWS},
    "template": templates.CASES,
    "model": {**models.CASES, **gguf_files.CASES, **names.MODELS},
    "adapter": {**adapters.CASES, **names.ADAPTERS},
    "run": {**runs.CASES, **names.RUNS},
    "prompts": prompts.CASES,
}
NUM_CASES = sum(map(len, KINDS.values()))
LONG = bool(os.environ.get("LORAFIT_LONG"))  # `make hostile`: every case, and more readers
SHARE, LEAST = 8, 8  # otherwise one case in so many, and so many of each kind
SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
MEGABYTES = 900  # what is promised is half of it
SECONDS = (
    4.0 if LONG else math.inf
)  # of the processor, on a quiet machine; else what hangs fails by its own limit
ONE_PROBLEM = re.compile(r"\Aerror: .+\n(   at: .+\n)?( hint: .+\n)?\Z")
LINES = re.compile(r"(error: |   at: | hint: |\.\.\. and )")

Report = dict[tuple[str, str], list[str]]


def test_there_are_enough() -> None:
    assert NUM_CASES >= 200


def chosen() -> list[tuple[str, str]]:
    """The cases to try: all in the long form, else a sample that is always the same."""
    draw = random.Random(0)
    return [
        (kind, name)
        for kind, made in KINDS.items()
        for name in (made if LONG else sorted(draw.sample(sorted(made), max(LEAST, len(made) // SHARE))))
    ]


def test_the_sample_has_every_kind() -> None:
    assert {kind for kind, _ in chosen()} == set(KINDS) == set(READERS)
    assert len(chosen()) >= (NUM_CASES if LONG else LEAST * len(KINDS))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A good model, rows, and a run that was stopped after one step of two."""
    folder = tmp_path_factory.mktemp("good")
    return make_good(folder)


def make_good(folder: Path) -> Place:
    model, data = write_model(folder / "model", **SHAPE), write_rows(folder / "rows.json", 6)
    server = Server()
    settings = [
        *(word for word in SETTINGS if "max_steps" not in word),
        "train.max_steps=2",
        "train.save_every=1",
    ]
    words = ["train", "--model", str(model), "--data", str(data), "--output", str(folder / "run"), *settings]
    done = server.run([*words, "train.batch_size=3"], folder, [folder])
    server.close()
    assert (done.code, done.acts) == (0, []), done
    shutil.rmtree(folder / "run" / "checkpoints" / "step-000002")
    return Place(folder, folder, model, data, folder / "run")


@pytest.fixture(scope="module")
def report(good: Place, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Report:
    """What was wrong with each case that was asked for, by kind and name."""
    asked = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    wanted = [(each["kind"], each["name"]) for each in asked if each.keys() == {"kind", "name"}]
    return examine(good, tmp_path_factory.mktemp("cases"), wanted)


def examine(good: Place, folder: Path, wanted: Sequence[tuple[str, str]]) -> Report:
    """The faults of the `wanted` cases, shared out among as many servers as there are processors."""
    servers = [Server() for _ in range(max(1, min(4, os.cpu_count() or 1)))]

    def share(number: int) -> Report:
        return {
            (kind, name): list(
                faults(servers[number], good, folder / f"{kind}-{at}", kind, KINDS[kind][name])
            )
            for at, (kind, name) in enumerate(wanted)
            if at % len(servers) == number
        }

    with ThreadPoolExecutor(len(servers)) as pool:
        shares = list(pool.map(share, range(len(servers))))
    for server in servers:
        server.close()
    return {key: found for part in shares for key, found in part.items()}


def faults(server: Server, good: Place, folder: Path, kind: str, case: Case) -> Iterator[str]:
    """What is wrong with how the readers of its kind end on a case."""
    readers = READERS[kind] | (MORE_READERS.get(kind, {}) if LONG else {})
    for reader, words in readers.items():
        shutil.rmtree(folder, ignore_errors=True)
        place = Place(folder / "its", folder / "outside", good.model, good.rows, good.run)
        work = folder / "work"
        for made in (place.folder, place.outside, work):
            made.mkdir(parents=True)
        (place.outside / "precious.txt").write_text("precious\n")
        it = case.make(place)
        files = {"it": it, "model": good.model, "rows": good.rows, "run": good.run, "out": work / "out"}
        own = [work, it] if kind == "run" else [work]
        before = snapshot(folder, own)
        stdin = it if kind == "prompts" and "{it}" not in words else None
        done = server.run([word.format(**files) for word in words], work, own, stdin)
        for fault in judge(done, case, reader):
            yield f"{reader}: {fault}"
        if snapshot(folder, own) != before:
            yield f"{reader}: something outside was changed"
        if any(folder.rglob("PWNED")):
            yield f"{reader}: code was run"
    shutil.rmtree(folder, ignore_errors=True)


def judge(done: Outcome, case: Case, reader: str) -> Iterator[str]:
    """What is wrong with an outcome."""
    yield from done.acts
    if done.seconds > SECONDS:
        yield f"it took {done.seconds} s"
    if done.megabytes > MEGABYTES:
        yield f"it took {done.megabytes} MB"
    if any(character in done.err + done.out for character in "\x1b\x07\u202e"):
        yield f"it steers the terminal: {done.err!r}"
    if done.code == 0 and reader in TELLING and case.harmless:
        return
    if done.code == 0 and {reader, LIKE.get(reader, reader)} & (case.harmless | SHOWING | PATIENT):
        return
    if done.code != 2:
        yield f"exit code {done.code}: {done.err[-600:]}"
    elif reader in TELLING and done.out:  # what it cannot begin with it refuses as all others do
        found = json.loads(done.out)["verdicts"]
        if all(verdict["verdict"] != "fail" for verdict in found):
            yield f"nothing is wrong: {found}"
    elif case.many:
        if not all(LINES.match(line) for line in refusal(done.err).splitlines()):
            yield f"not an error a line: {done.err[:600]}"
    elif not ONE_PROBLEM.match(refusal(done.err)):
        yield f"not one clear line: {done.err[:600]}"


def refusal(said: str) -> str:
    """What was said from the first error on; notes and warnings may come before."""
    start = re.search("^error: ", said, re.MULTILINE)
    return said[start.start() :] if start else said


def snapshot(folder: Path, own: list[Path]) -> dict[str, tuple[object, ...]]:
    """Every file, folder and link below `folder` that is none of `own`."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        if any(path.is_relative_to(other) for other in own):
            continue
        status = path.lstat()
        small = stat.S_ISREG(status.st_mode) and status.st_size < 1 << 20
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if small else ""
        link = str(path.readlink()) if path.is_symlink() else ""
        size = 0 if path.is_dir() else status.st_size
        found[str(path)] = (stat.S_IFMT(status.st_mode), size, digest, link)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), chosen())
def test_a_hostile_file_is_refused_and_nothing_else_happens(kind: str, name: str, report: Report) -> None:
    assert report[kind, name] == []


@pytest.mark.slow
def test_the_watch_sees_what_it_is_there_for(good: Place, tmp_path: Path) -> None:
    """A run that writes elsewhere is caught: the adapter of the good model, with nothing allowed."""
    server = Server()
    done = server.run(["generate", str(good.model), "hi", *ASK], tmp_path, [])
    assert (done.code, done.acts) == (0, [])
    words = ["train", "--model", str(good.model), "--data", str(good.rows), "--output", str(tmp_path / "out")]
    done = server.run([*words, *SETTINGS], tmp_path, [])
    server.close()
    assert any(str(tmp_path / "out") in act for act in done.acts)
