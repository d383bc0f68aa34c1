"""Typical mistakes of commit protocols, injected into lorafit one at a time; the campaigns must detect each."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from lorafit import run_dir
from lorafit.data.row_order import RowOrder
from lorafit.observe import metrics_file
from lorafit.run_dir import RunDirectory
from lorafit.storage import atomic
from lorafit.training import checkpoint, checkpoint_writer, loop, run

_sync, _write_file, _snapshot, _rows = atomic.sync, atomic.write_file, loop.snapshot, RowOrder.rows


def _sync_only(condition: Callable[[Path], bool]) -> None:
    def sync(path: Path) -> None:
        if condition(path):
            _sync(path)

    atomic.sync = checkpoint_writer.sync = metrics_file.sync = run_dir.sync = sync


def _files_are_not_synced() -> None:
    _sync_only(lambda path: path.is_dir() or not path.parent.name.startswith(".staging"))


def _the_staging_folder_is_not_synced() -> None:
    _sync_only(lambda path: not path.name.startswith(".staging"))


def _the_parent_is_not_synced() -> None:
    _sync_only(lambda path: path.name != "checkpoints")


def _the_parents_of_new_folders_are_not_synced() -> None:
    atomic.make_folder = lambda folder: folder.mkdir(parents=True, exist_ok=True)
    checkpoint_writer.make_subfolder = lambda folder: folder.mkdir(exist_ok=True)
    metrics_file.sync = lambda path: None


def _small_files_are_written_in_place() -> None:
    def write_file(path: Path, text: str) -> None:
        atomic._write_synced(path, [text.encode()])

    atomic.write_file = run_dir.write_file = write_file
    metrics_file.write_lines = lambda path, lines: write_file(path, b"".join(lines).decode())


def _older_checkpoints_are_removed_before_the_new_one_is_complete() -> None:
    save = checkpoint_writer.AsyncCheckpointWriter.save

    def rotate_first(saver: checkpoint_writer.AsyncCheckpointWriter, *rest: Any) -> None:
        saver.wait(block=True)
        saver._run.rotate(saver._keep - 1) if saver._keep > 1 else _remove_all(saver._run)
        save(saver, *rest)

    checkpoint_writer.AsyncCheckpointWriter.save = rotate_first  # type: ignore[method-assign]


def _remove_all(directory: RunDirectory) -> None:
    for step in directory.saved_steps():
        directory.set_aside(step)


def _orphans_are_not_removed() -> None:
    atomic.clean_orphans = run_dir.clean_orphans = lambda *_: []


def _written_files_are_not_verified() -> None:
    atomic.verify_folder = lambda *_, **__: []


def _an_error_of_fsync_is_ignored() -> None:
    def sync(path: Path) -> None:
        with contextlib.suppress(OSError):
            _sync(path)

    atomic.sync = sync


def _metrics_of_lost_steps_are_not_removed() -> None:
    run.truncate_after = lambda path, step: 0


def _random_states_are_not_restored() -> None:
    checkpoint._restore_random = lambda tensors: None


def _the_optimizer_is_reset() -> None:
    checkpoint._restore_optimizer = lambda *_: None


def _the_loss_scale_is_reset() -> None:
    state_of = checkpoint.state_of

    def reset_scale(values: Mapping[str, Any]) -> checkpoint.TrainState:
        state = state_of(values)
        state.scale = checkpoint.LossScale.for_dtype(torch.float16) if state.scale.active else state.scale
        return state

    checkpoint.state_of = reset_scale


def _a_resume_restarts_its_epoch() -> None:
    load = run.load_checkpoint

    def restart(*rest: Any) -> checkpoint.TrainState:
        state = load(*rest)
        RowOrder.rows = lambda order, step: _rows(order, step - state.step)  # type: ignore[method-assign]
        return state

    run.load_checkpoint = restart


class _Late(Mapping[str, bytes]):
    """The files of a snapshot, created at their first use."""

    def __init__(self, make: Callable[[], Mapping[str, bytes]]) -> None:
        self._make = make
        self._files: Mapping[str, bytes] | None = None

    def _now(self) -> Mapping[str, bytes]:
        if self._files is None:
            time.sleep(0.05)
            self._files = self._make()
        return self._files

    def __getitem__(self, name: str) -> bytes:
        return self._now()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._now())

    def __len__(self) -> int:
        return len(self._now())


def _the_state_is_read_during_training() -> None:
    def live(prepared: Any, optimizer: Any, state: Any) -> Mapping[str, bytes]:
        values = checkpoint.asdict(state)

        def files() -> Mapping[str, bytes]:
            contents = _snapshot(prepared, optimizer, state)
            plain = values | {"python_random": random.getstate()}
            contents[checkpoint.STATE] = (checkpoint.json.dumps(plain) + "\n").encode()
            return contents

        return _Late(files)

    loop.snapshot = live  # type: ignore[assignment]


MUTATIONS: Mapping[str, Callable[[], None]] = {
    function.__name__.strip("_").replace("_", " "): function
    for function in (
        _files_are_not_synced,
        _the_staging_folder_is_not_synced,
        _the_parent_is_not_synced,
        _the_parents_of_new_folders_are_not_synced,
        _small_files_are_written_in_place,
        _older_checkpoints_are_removed_before_the_new_one_is_complete,
        _orphans_are_not_removed,
        _written_files_are_not_verified,
        _an_error_of_fsync_is_ignored,
        _metrics_of_lost_steps_are_not_removed,
        _random_states_are_not_restored,
        _the_optimizer_is_reset,
        _the_loss_scale_is_reset,
        _a_resume_restarts_its_epoch,
        _the_state_is_read_during_training,
    )
}


def mutate(name: str) -> None:
    """Inject the mistake `name` into this process; none for ""."""
    if name:
        MUTATIONS[name]()
