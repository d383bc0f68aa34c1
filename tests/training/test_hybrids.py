"""Runs of networks whose layers do not all attend keep the invariants of the others."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.runs import digest, interrupt_after, tiny_run, tiny_settings
from tests.tiny_models import HYBRIDS

from lorafit.training.run import Result, resume_run

pytestmark = pytest.mark.slow
COMMON = ("train.max_steps=3", "train.save_every=1", "lora.dropout=0.2")


def distance(one: Result, other: Result) -> float:
    """How far two adapters are apart, relative to the first."""
    first, second = (load_file(result.adapter / "adapter_model.safetensors") for result in (one, other))
    apart = sum(float((tensor - second[name]).square().sum()) for name, tensor in first.items())
    return (apart / sum(float(tensor.square().sum()) for tensor in first.values())) ** 0.5


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_run_is_the_same_however_it_is_computed(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny_settings(tmp_path, *COMMON, family=family, num_rows=24)
    whole = tiny_run(settings, tmp_path / "whole")
    assert digest(tiny_run(settings, tmp_path / "again", "train.recompute=layers")) == digest(whole)
    apart = tiny_run(settings, tmp_path / "apart", "data.packing=false")
    split = tiny_run(settings, tmp_path / "split", "train.micro_batch_tokens=100")
    eight = tiny_run(settings, tmp_path / "eight", "model.quantize=int8")
    assert distance(whole, apart) < 1e-3
    assert distance(whole, split) < 1e-3
    assert 1e-6 < distance(whole, eight) < 0.3
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        tiny_run(settings, tmp_path / "stopped")
    assert digest(resume_run(tmp_path / "stopped", quiet=True)) == digest(whole)
