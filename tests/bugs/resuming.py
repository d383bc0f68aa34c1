"""A resumed run equals an uninterrupted run (bugs 8, 9, 10, 31)."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.bugs.catalogue import probe
from tests.bugs.lab import Lab, Plant, events
from tests.waiting import HANGS

from lorafit.model.adapter_file import WEIGHTS
from lorafit.storage.atomic import sha256_file
from lorafit.training import checkpoint, checkpoint_writer, loop
from lorafit.training.run import Result

NINE = (
    "train.max_steps=9",
    "train.save_every=2",
    "train.keep=9",
)  # 20 rows in steps of six: an epoch has four steps


def _epochs(lab: Lab) -> str:
    return f"data.path={lab.rows(20, 'twenty.json')}"


def _digest(result: Result) -> str:
    return sha256_file(result.adapter / WEIGHTS)


@probe(
    8,
    Plant("training.loop:_batch", "job.order.rows(step)", "job.order.rows(step % job.order.steps_per_epoch)"),
    Plant("data.row_order:_epoch_rows", "_COPIES, epoch])", "_COPIES])"),
    Plant("training.loop:_steps", act=lambda patch: _start_over_when_resumed(patch)),
)
def a_resumed_run_takes_the_next_rows(lab: Lab) -> None:
    """The rows of each step are the same with and without a stop; each epoch has every row once, in a new order."""
    lab.watch()
    lab.run(*NINE, _epochs(lab), name="whole")
    whole, lab.rows_seen[:] = list(lab.rows_seen), []
    lab.cut_and_resumed(6, *NINE, _epochs(lab))
    assert lab.rows_seen == whole
    first, second = (list(chain(*whole[start : start + 4])) for start in (0, 4))
    assert Counter(first) == Counter(second) == Counter(range(20))
    assert first != second


def _start_over_when_resumed(patch: pytest.MonkeyPatch) -> None:
    """The row order starts from its beginning in every process."""
    steps = loop._steps

    def from_the_start(job: loop.TrainContext, state: Any, *rest: Any) -> Any:
        first_step, rows = state.step, type(job.order).rows
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(type(job.order), "rows", lambda order, step: rows(order, step - first_step))
            return steps(job, state, *rest)

    patch.setattr(loop, "_steps", from_the_start)


@probe(
    9,
    Plant("training.checkpoint:_restore_random", 'torch.set_rng_state(tensors["random.torch"])', "pass"),
)
def a_resumed_run_restores_the_dropout(lab: Lab) -> None:
    """With dropout, a stopped and resumed run ends with the bytes of an uninterrupted run."""
    dropout = "lora.dropout=0.2"
    whole = lab.run(*NINE, _epochs(lab), dropout, name="whole")
    assert _digest(lab.cut_and_resumed(6, *NINE, _epochs(lab), dropout)) == _digest(whole)


@probe(
    10,
    Plant("training.checkpoint:load_checkpoint", "_restore_optimizer(network, optimizer, tensors)", "pass"),
    Plant("training.checkpoint:load_checkpoint", "state = state_of(values)", "state = TrainState(step=0)"),
    Plant("training.checkpoint:load_checkpoint", "fill_adapter(network, weights, place)", "pass"),
)
def a_resumed_run_keeps_optimizer_and_step(lab: Lab) -> None:
    """Optimizer state, learning rates and final adapter equal those of an uninterrupted run."""
    whole = lab.run(*NINE, _epochs(lab), name="whole")
    resumed = lab.cut_and_resumed(6, *NINE, _epochs(lab))
    rates = [[event["learning_rate"] for event in events(result, "step")] for result in (whole, resumed)]
    assert rates[0] == rates[1]
    one, two = (
        load_file(r.path / "checkpoints" / "step-000009" / checkpoint.TENSORS) for r in (whole, resumed)
    )
    for name, tensor in one.items():
        assert tensor.equal(two[name]), name
    assert _digest(whole) == _digest(resumed)


@probe(31, Plant("training.loop:_save", act=lambda patch: patch.setattr(loop, "snapshot", _LiveSnapshot)))
def a_checkpoint_has_the_state_of_its_step(lab: Lab) -> None:
    """With a slow disk, two steps pass while step 2 is written: the checkpoint contains step 2, not step 4."""
    passed, write, save, kept = threading.Event(), checkpoint_writer.commit_files, loop._save, {}

    def slow(folder: Path, *rest: Any) -> None:
        if folder.name == "step-000002":
            assert passed.wait(HANGS)
        write(folder, *rest)

    def recorded(job: loop.TrainContext, saver: Any, state: Any, reason: str) -> None:
        files = checkpoint.snapshot(job.prepared, job.optimizer, state)
        kept[state.step] = hashlib.sha256(files[WEIGHTS]).hexdigest()
        if state.step == 4:
            passed.set()
        save(job, saver, state, reason)

    lab.patch.setattr(checkpoint_writer, "commit_files", slow)
    lab.patch.setattr(loop, "_save", recorded)
    result = lab.run("train.max_steps=4", "train.save_every=2", "train.keep=9")
    assert kept[2] != kept[4]
    for step, digest in kept.items():
        assert sha256_file(result.path / "checkpoints" / f"step-{step:06d}" / WEIGHTS) == digest, (
            f"step {step}"
        )


class _LiveSnapshot(Mapping[str, bytes]):
    """A snapshot that reads the tensors at the time of the write, as an asynchronous save without a copy does."""

    def __init__(self, *state: Any) -> None:
        self._state = state

    def __getitem__(self, name: str) -> bytes:
        return checkpoint.snapshot(*self._state)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(checkpoint.snapshot(*self._state))

    def __len__(self) -> int:
        return len(checkpoint.snapshot(*self._state))
