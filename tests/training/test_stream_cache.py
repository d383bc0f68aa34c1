"""Adapters on the upper layers: what lies below them is computed once per row, and a run has the same bytes."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tests.runs import digest, events, interrupt_after, tiny_run, without_clock

from lorafit.config.load import load_config
from lorafit.data.packing import Packer, TokenRow
from lorafit.errors import ConfigError
from lorafit.training.run import Result, resume_run, start_run
from lorafit.training.stream_cache import StreamCache

UPPER = ["lora.layers=1", "lora.dropout=0.1", "train.epochs=3", "data.holdout=8", "train.eval_every=4"]


@pytest.fixture(scope="module")
def without(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The run that computes all layers in each pass."""
    return tiny_run(
        [*tiny, *UPPER], tmp_path_factory.mktemp("layers") / "run", "train.keep_activations=false"
    )


def what_happened(result: Result) -> list[dict[str, Any]]:
    return [without_clock(event) for kind in ("step", "heldout") for event in events(result, kind)]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows whose stream is stored, as often as it is."""
    rows: list[int] = []
    write = StreamCache._write

    def spy(self: StreamCache, pack: Any, numbers: Any, stream: Any) -> None:
        rows.extend(numbers.tolist())
        write(self, pack, numbers, stream)

    monkeypatch.setattr(StreamCache, "_write", spy)
    return rows


def test_the_bytes_and_every_number_are_those_without_it(
    tiny: list[str], without: Result, tmp_path: Path, written: list[int]
) -> None:
    """Each of the 36 trained and 4 held-out rows is computed below the adapter once."""
    result = tiny_run([*tiny, *UPPER], tmp_path / "run")
    assert digest(result) == digest(without)
    assert what_happened(result) == what_happened(without)
    assert sorted(written) == sorted([*range(36), *range(4)])
    assert not [path for path in result.path.rglob("*") if "activation" in path.name]


@pytest.mark.parametrize("step", [5, 9])
def test_a_resumed_run_has_the_same_bytes(
    tiny: list[str], without: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(step, patch)
        stopped = tiny_run([*tiny, *UPPER], tmp_path / "run")
    assert not stopped.finished
    assert digest(resume_run(stopped.path, quiet=True)) == digest(without)


def test_a_second_phase_on_all_rows_has_the_same_bytes(tiny: list[str], tmp_path: Path) -> None:
    refit = [*tiny, *UPPER, "train.refit=true"]
    kept, computed = (
        tiny_run(refit, tmp_path / str(keeps), f"train.keep_activations={keeps}") for keeps in (True, False)
    )
    assert events(kept, "refit")
    assert digest(kept) == digest(computed)


@pytest.mark.parametrize("fault", ["small disk", "full disk", "damaged"])
def test_a_fault_of_the_disk_costs_time_only(
    tiny: list[str],
    without: Result,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: str,
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if fault == "small disk":
        monkeypatch.setattr("lorafit.training.stream_cache.MOST_OF_FREE", 0.0)
    else:
        monkeypatch.setattr(os, "pwrite" if fault == "full disk" else "preadv", full)
    result = start_run(load_config(None, [*tiny, *UPPER, f"run.output={tmp_path / 'run'}"]))
    assert digest(result) == digest(without)
    printed = " ".join(capsys.readouterr().err.split())
    assert printed.count("are computed again each time") == 2  # of trained and of held-out rows


def test_the_adapter_is_on_the_upper_layers_alone(without: Result) -> None:
    with safe_open(without.adapter / "adapter_model.safetensors", "pt") as file:
        assert {name.partition("layers.")[2][0] for name in file.keys()} == {"1"}  # noqa: SIM118


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["lora.layers=3"], "the model has 2"),
        (["lora.layers=1", "lora.targets=layers.0.mlp.up_proj"], "none of `lora.targets` is in them"),
    ],
)
def test_what_cannot_be_is_an_error(
    tiny: list[str], tmp_path: Path, settings: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_run([*tiny, *settings], tmp_path / "run")


@st.composite
def some_rows(draw: st.DrawFn) -> list[TokenRow]:
    lengths = draw(st.lists(st.integers(2, 30), min_size=1, max_size=12))
    rows = []
    for number, length in enumerate(lengths):
        trained = np.zeros(length, bool)
        trained[1 + number % (length - 1) :] = True
        rows.append((np.arange(length, dtype=np.uint16) * (number % 2 + 1), trained))
    return rows


@given(some_rows(), st.integers(8, 64), st.sampled_from([torch.float32, torch.bfloat16]), st.data())
def test_what_is_read_is_what_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[TokenRow],
    capacity: int,
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    """In packs of other rows too; and nothing is read where a row of a pack is not there."""
    lengths, like = np.array([len(ids) for ids, _ in rows]), torch.empty(1, 3, dtype=dtype)
    cache = StreamCache(1, lengths, like, tmp_path_factory.getbasetemp(), lambda event: None)
    streams = [torch.randn(len(ids), 3).to(dtype) for ids, _ in rows]
    numbers = np.arange(len(rows))
    below = cache.of(numbers)

    def expected(pack: Any) -> torch.Tensor:
        parts = zip(pack.rows.tolist(), pack.lengths, strict=True)
        return torch.cat([streams[row][:length] for row, length in parts])

    order = data.draw(st.permutations(range(len(rows))))
    for pack in Packer(capacity).packs(rows):
        assert below.read(pack) is None
        below.write(pack, expected(pack))
    for pack in Packer(capacity * 2).packs([rows[at] for at in order], order):
        read = below.read(pack)
        assert read is not None
        assert torch.equal(read, expected(pack))
