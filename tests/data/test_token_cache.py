"""The cache: the same rows and ledger as a fresh start, a miss for every change, and never a failed run."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from tests.data.toy_tokenizers import llama_like, load
from tests.waiting import HANGS

from lorafit.data import token_cache, token_dataset
from lorafit.data.ledger import Ledger
from lorafit.data.prompt import Renderer, contract
from lorafit.data.sources import Reading, find_sources
from lorafit.data.token_cache import Entry, encode_files
from lorafit.data.token_dataset import open_encoded
from lorafit.data.tokenizer import Tokenizer
from lorafit.errors import DataError, RunError
from lorafit.storage import locks
from lorafit.storage.atomic import sha256_file, verify_folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(llama_like(tmp_path_factory.mktemp("toy")))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's entries are."""
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rows"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.json")


def write_rows(path: Path, count: int = 9) -> Path:
    rows = [{"instruction": f"say {n}", "output": "" if n == 3 else f"so {n}"} for n in range(count)]
    path.write_text(json.dumps(rows))
    return path


def renderer(tokenizer: Tokenizer, **changes: Any) -> Renderer:
    rules = {"template": "chat", "train_on": "response", "max_length": 512, "too_long": "error"}
    return Renderer(contract(tokenizer, **{**rules, "add_eos": True, **changes}), tokenizer)


def run(path: Path, tokenizer: Tokenizer, format_name: str = "auto", **changes: Any) -> Entry:
    return encode_files(find_sources([str(path)], Reading(format_name)), renderer(tokenizer, **changes))


def test_without_weights_the_digest_is_that_of_version_0_1(
    rows: Path, tokenizer: Tokenizer, place: Path
) -> None:
    """A run of version 0.1 compares it when it is resumed."""
    entry = run(rows, tokenizer)
    (folder,) = (path for path in place.iterdir() if (path / "tokens.bin").is_file())
    sums = (sha256_file(folder / f"{name}.bin") for name in ("tokens", "offsets", "numbers"))
    assert entry.digest == hashlib.sha256("".join(sums).encode()).hexdigest()
    rows.write_text(json.dumps([{"instruction": "say", "output": "so", "weight": 0.5}] * 9))
    weighted = run(rows, tokenizer)
    rows.write_text(json.dumps([{"instruction": "say", "output": "so", "weight": 0.25}] * 9))
    assert run(rows, tokenizer).digest != weighted.digest


def content(entry: Entry) -> dict[str, Any]:
    """All that is in an entry, as plain values."""
    flat = entry.encoded.flat
    arrays = {field.name: getattr(flat, field.name) for field in fields(flat) if field.name != "tokens"}
    for index in range(len(entry.encoded)):
        arrays |= {f"ids {index}": entry.encoded.row(index)[0], f"mask {index}": entry.encoded.row(index)[1]}
    dropped = {reason: rows.tolist() for reason, rows in entry.encoded.dropped.items()}
    ledger = Ledger.of(entry.facts["files"][0]["num_rows"], entry.encoded).to_json()
    lists = {name: (str(array.dtype), array.tolist()) for name, array in arrays.items()}
    return {**lists, "reasons": dropped, "ledger": ledger, "facts": dict(entry.facts), "digest": entry.digest}


def entries(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


def test_the_second_time_nothing_is_encoded_and_all_is_the_same(
    tokenizer: Tokenizer, rows: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(rows, tokenizer)
    assert first.encoded.dropped["the answer is empty"].tolist() == [3]
    assert verify_folder(place / entries(place)[0]) == []
    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "encode_chunks", None)
        second = run(rows, tokenizer)
        moved = run(Path(shutil.copy(rows, rows.with_name("other.json"))), tokenizer)  # the content counts
    assert content(first) == content(second) == content(moved)
    assert (first.notes, second.notes) == ((), ())
    told: list[tuple[int, int]] = []
    sources = find_sources([str(rows)], Reading("alpaca"))
    encode_files(sources, renderer(tokenizer), lambda *now: told.append(now))
    assert told == [(rows.stat().st_size,) * 2]


def test_every_change_misses(tokenizer: Tokenizer, rows: Path, place: Path, tmp_path: Path) -> None:
    other = load(llama_like(tmp_path / "toy"))
    other.sha256 = "0" * 64
    run(rows, tokenizer)
    for count, again in enumerate(
        (
            lambda: run(rows, tokenizer, "alpaca"),
            lambda: run(rows, tokenizer, max_length=511),
            lambda: run(rows, tokenizer, train_on="all"),
            lambda: run(rows, tokenizer, system="be brief"),
            lambda: run(rows, other),
            lambda: run(rows.rename(tmp_path / "rows.ndjson"), tokenizer, "alpaca"),
            lambda: run(write_rows(rows, 10), tokenizer),
        ),
        start=2,
    ):
        try:
            again()
        except DataError:  # an array in one line is no row: nothing is kept of it
            assert len(entries(place)) == count - 1
            run(write_rows(rows, 8), tokenizer)
        assert len(entries(place)) == count
    changed = rows.read_bytes().replace(b"so 5", b"so 6")
    rows.write_bytes(changed)
    run(rows, tokenizer)
    assert len(entries(place)) == count + 1


def test_the_version_of_the_encoding_is_part_of_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    before = token_cache.key_of([(".json", "0")], Reading(), "1")
    assert token_cache.key_of([(".json", "0")], Reading(), "1") == before
    monkeypatch.setattr(token_cache, "ENCODING", token_cache.ENCODING + 1)
    assert token_cache.key_of([(".json", "0")], Reading(), "1") != before


@pytest.mark.parametrize("file", ["tokens.bin", "offsets.bin", "numbers.bin", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_entry_is_made_again(
    tokenizer: Tokenizer, rows: Path, place: Path, file: str, damage: str
) -> None:
    whole = content(run(rows, tokenizer))
    path = place / entries(place)[0] / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[:-1])
    again = run(rows, tokenizer)
    assert content(again) == whole
    assert "damaged" in again.notes[0]
    assert run(rows, tokenizer).notes == ()
    assert len(entries(place)) == 1


def test_two_that_build_the_same_entry_at_once(
    tokenizer: Tokenizer, rows: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner: list[Entry] = []
    encode_chunks = token_cache.encode_chunks

    def meanwhile(*args: Any, **options: Any) -> dict[str, Any]:
        if not inner:
            inner.append(None)  # type: ignore[arg-type]
            inner[0] = run(rows, tokenizer)  # another process begins later and is done sooner
        return encode_chunks(*args, **options)

    monkeypatch.setattr(token_cache, "encode_chunks", meanwhile)
    monkeypatch.setattr(
        token_cache, "exclusive_lock", lambda *_: nullcontext(print)
    )  # on a file system without locks
    outer = run(rows, tokenizer)
    assert content(outer) == content(inner[0])
    assert len(entries(place)) == 1
    monkeypatch.undo()
    monkeypatch.setenv("LORAFIT_CACHE", str(place.parent / "second"))
    with ThreadPoolExecutor(4) as pool:
        several = list(pool.map(lambda _: content(run(rows, tokenizer)), range(4)))
    assert several == [content(outer)] * 4


def test_of_several_that_want_the_same_entry_one_builds_it_however_long_that_takes(
    tokenizer: Tokenizer, rows: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_chunks, exclusive_lock, calls = token_cache.encode_chunks, token_cache.exclusive_lock, []
    arrived, numbers = threading.Event(), itertools.count(1)

    def counted(*given: Any) -> AbstractContextManager[Callable[[], None]]:
        if next(numbers) == 4:
            arrived.set()
        return exclusive_lock(*given)

    def slow(*args: Any, **options: Any) -> dict[str, Any]:
        calls.append(1)
        assert arrived.wait(HANGS)  # all want it before it is there
        return encode_chunks(*args, **options)

    monkeypatch.setattr(token_cache, "exclusive_lock", counted)
    monkeypatch.setattr(token_cache, "encode_chunks", slow)
    with ThreadPoolExecutor(4) as pool:
        several = list(pool.map(lambda _: content(run(rows, tokenizer)), range(4)))
    assert several == [several[0]] * 4
    assert len(calls) == 1


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX permissions")
def test_the_cache_is_for_its_user_alone(tokenizer: Tokenizer, rows: Path, place: Path) -> None:
    run(rows, tokenizer)
    for folder in (place, place / entries(place)[0]):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert str(rows.parent) not in (place / entries(place)[0] / "manifest.json").read_text()


def test_where_nothing_can_be_cached_a_temporary_folder_does(
    tokenizer: Tokenizer, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    entry = run(rows, tokenizer)
    assert "not cached" in entry.notes[0]
    assert len(content(entry)["numbers"][1]) == 8  # it can still be read
    assert list((tmp_path / "tmp").iterdir()) == []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(RunError, match="set LORAFIT_CACHE to a folder"):
        run(rows, tokenizer)


def test_a_full_disk_is_no_reason_to_fail(
    tokenizer: Tokenizer, rows: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_chunks = token_cache.encode_chunks

    def full(chunks: Any, renderer: Renderer, folder: Path, **options: Any) -> dict[str, Any]:
        if place in folder.parents:
            raise OSError(28, "No space left on device")
        return encode_chunks(chunks, renderer, folder, **options)

    monkeypatch.setattr(token_cache, "encode_chunks", full)
    entry = run(rows, tokenizer)
    assert "No space left on device" in entry.notes[0]
    assert len(entry.encoded) == 8
    assert entries(place) == []


def test_the_entries_not_used_for_longest_go(
    tokenizer: Tokenizer, rows: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(rows, tokenizer)
    [first] = entries(place)
    run(rows, tokenizer, max_length=400)
    second = next(name for name in entries(place) if name != first)
    os.utime(place / first, (1000, 1000))
    os.utime(place / second, (2000, 2000))
    (place / ".building-crashed").mkdir()
    os.utime(place / ".building-crashed", (1000, 1000))
    run(rows, tokenizer)  # the first is in use again
    assert (place / first).stat().st_mtime > 2000
    size = sum(path.stat().st_size for path in (place / first).iterdir())
    monkeypatch.setattr(token_cache, "MAX_BYTES", int(2.5 * size))
    run(rows, tokenizer, max_length=300)
    assert len(entries(place)) == 2
    assert first in entries(place)
    assert second not in entries(place)


def test_a_file_that_changes_while_it_is_read_is_refused(
    tokenizer: Tokenizer, rows: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = token_dataset._Writer.finish

    def late(writer: Any) -> dict[str, Any]:
        write_rows(rows, 5)
        return finish(writer)

    monkeypatch.setattr(token_dataset._Writer, "finish", late)
    with pytest.raises(DataError, match="changed while it was read"):
        run(rows, tokenizer)
    assert entries(place) == []


def test_what_is_wrong_with_rows_is_never_cached(tokenizer: Tokenizer, rows: Path, place: Path) -> None:
    for _ in range(2):
        with pytest.raises(DataError, match=r"rows are longer than data\.max_length=4"):
            run(rows, tokenizer, max_length=4)
    assert entries(place) == []


def test_rows_outlive_their_entry(tokenizer: Tokenizer, rows: Path, place: Path) -> None:
    entry = run(rows, tokenizer)
    before = content(entry)
    shutil.rmtree(place)
    assert content(entry) == before


@pytest.mark.parametrize("turn", ["fifo", "link", "folder"])
def test_a_turn_that_is_no_plain_file_is_not_opened(
    turn: str, tokenizer: Tokenizer, rows: Path, place: Path, tmp_path: Path
) -> None:
    first = run(rows, tokenizer)
    [file] = (place.parent / "turns").iterdir()
    file.unlink()
    if turn == "fifo":
        os.mkfifo(file)
    elif turn == "link":
        file.symlink_to(tmp_path / "elsewhere")
    else:
        file.mkdir()
    again = run(rows, tokenizer)
    assert content(again) == content(first)
    assert again.notes[0].startswith("the tokens are not cached: ")
    assert not (tmp_path / "elsewhere").exists()


def test_a_holder_that_stands_still_is_named_and_not_waited_for(
    tokenizer: Tokenizer,
    rows: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = run(rows, tokenizer)
    [turn] = (place.parent / "turns").iterdir()
    holder = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import sys; from pathlib import Path; from lorafit.storage.locks import exclusive_lock\n"
            "with exclusive_lock(Path(sys.argv[1]), print): print('held', flush=True); sys.stdin.read()",
            *(str(turn), "train", "hf_" + "Ab12" * 8),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    holder.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(locks, "WAITING_SECONDS", 0.0)
    patient = token_cache.exclusive_lock
    monkeypatch.setattr(token_cache, "exclusive_lock", lambda *given: patient(*given, patience=0.2))
    try:
        again = run(rows, tokenizer)
    finally:
        holder.kill()
        holder.communicate()
    assert content(again) == content(first)
    who = re.compile(rf"process {holder.pid} since \d\d:\d\d:\d\d: .* train '\*\*\*'")
    assert who.search(again.notes[0])
    assert who.search(caplog.text)
    assert len(entries(place)) == 1


def test_one_that_goes_on_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its signs of life come later than the patience in all, and earlier than the patience each."""
    turn, now, holding = tmp_path / "turn", [0.0], []
    with locks.exclusive_lock(turn, print) as alive:

        def tick(_: float) -> None:
            now[0] += 100
            alive()
            if now[0] > 1000:
                holding.append(True)
                raise InterruptedError

        monkeypatch.setattr(locks.time, "monotonic", lambda: now[0])
        monkeypatch.setattr(locks.time, "sleep", tick)
        with pytest.raises(InterruptedError), locks.exclusive_lock(turn, lambda _: None):
            pass
    assert holding


@pytest.mark.parametrize("level", ["cache", "cache/rows", "cache/turns", "above"])
def test_a_cache_that_others_can_write_is_not_used(
    level: str, tokenizer: Tokenizer, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "above" / "cache"))
    first = run(rows, tokenizer)
    open_to_all = tmp_path / ("above" if level == "above" else f"above/{level}")
    open_to_all.chmod(0o777)
    monkeypatch.setattr(
        token_cache, "open_encoded", lambda folder, facts: open_encoded(_outside(folder, tmp_path), facts)
    )
    again = run(rows, tokenizer)
    assert content(again) == content(first)
    [note] = again.notes
    assert "can be written by other users" in note
    assert str(open_to_all) in note
    if level == "above":
        open_to_all.chmod(0o1777)  # as /tmp is
        monkeypatch.undo()
        monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "above" / "cache"))
        assert run(rows, tokenizer).notes == ()


def _outside(folder: Path, cache: Path) -> Path:
    assert not folder.is_relative_to(cache)
    return folder


def test_a_cache_of_another_user_is_not_used(
    tokenizer: Tokenizer, rows: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(rows, tokenizer)
    monkeypatch.setattr("lorafit.storage.ownership.os.geteuid", lambda: os.getuid() + 12345)
    [note] = run(rows, tokenizer).notes
    assert "belongs to user" in note
