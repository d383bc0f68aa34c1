"""Waits for a download: one for another process says for whom and has an end, and Ctrl-C ends all of them."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.hub.stub import Hub, _etag
from tests.hub.test_hub import MODEL
from tests.waiting import HANGS

from lorafit.errors import ModelError
from lorafit.hub import client, waits
from lorafit.hub.client import model_folder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="who holds a lock is read from /proc/locks")


@contextmanager
def held(path: Path) -> Iterator[int]:
    """Another process that holds a lock; yields its number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    program = (
        "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True); "
        "sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    try:
        yield holder.pid
    finally:
        holder.communicate()


def test_a_holder_is_named_and_not_waited_for_without_end(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub.add("owner/tiny", MODEL)
    monkeypatch.setattr(waits, "WAITING_SECONDS", 0.01)
    watched = client.watched_waits
    monkeypatch.setattr(client, "watched_waits", lambda storage: watched(storage, patience=0.0))
    content = MODEL["config.json"]
    assert isinstance(content, str)
    lock = tmp_path / "cache" / ".locks" / "models--owner--tiny" / f"{_etag(content.encode())}.lock"
    with held(lock) as process, pytest.raises(ModelError, match=f"process {process} holds its files"):
        model_folder("owner/tiny")
    assert f"process {process} downloads the same files" in caplog.text
    assert "Still waiting" not in caplog.text
    assert model_folder("owner/tiny").path.is_dir()


def test_the_library_is_left_as_it_was(tmp_path: Path) -> None:
    library = logging.getLogger("huggingface_hub.utils._fixes")
    before = (library.level, [*library.filters], waits.constants.FILELOCK_LOG_EVERY_SECONDS)
    with pytest.raises(KeyError), waits.watched_waits(tmp_path):
        assert library.isEnabledFor(logging.INFO)
        raise KeyError
    assert (library.level, [*library.filters], waits.constants.FILELOCK_LOG_EVERY_SECONDS) == before


def test_a_download_that_goes_on_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It grows less often than the patience allows in all, and more often than it allows each time."""
    (tmp_path / "blobs").mkdir()
    now = [0.0]
    monkeypatch.setattr(waits.time, "monotonic", lambda: now[0])
    watch = waits._Watch(tmp_path, patience=120)
    record = logging.LogRecord("x", logging.INFO, "x", 1, "Still waiting to acquire lock on x", (), None)
    for number in range(5):
        (tmp_path / "blobs" / "a").write_bytes(bytes(number))
        now[0] += 100
        assert not watch.filter(record)
    now[0] += 119
    assert not watch.filter(record)
    now[0] += 1
    with pytest.raises(TimeoutError):
        watch.filter(record)


def test_an_interrupted_download_ends_with_its_next_piece() -> None:
    main, goes_on, ended = threading.main_thread().ident, threading.Event(), threading.Event()
    assert main is not None
    pieces: list[str] = []

    def download(bars: type[Any]) -> str:
        bar = bars(total=2, disable=True)
        try:
            for piece in ("first", "second"):
                bar.update(1)
                pieces.append(piece)
                signal.pthread_kill(main, signal.SIGINT)
                goes_on.wait(HANGS)
            return "all"
        finally:
            ended.set()

    with pytest.raises(KeyboardInterrupt):
        waits.interruptible(download)
    goes_on.set()
    assert ended.wait(HANGS)
    assert pieces == ["first"]


def test_a_download_gives_its_result_or_its_error() -> None:
    assert waits.interruptible(lambda bars: bars.__name__) == "Bar"

    def fails(bars: type[Any]) -> str:
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        waits.interruptible(fails)
