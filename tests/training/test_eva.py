"""EVA starts where peft's does, from the first rows of the run alone, and the run is resumed and repeated exactly."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.runs import digest, interrupt_after, tiny_run
from tests.tiny_models import random_network, write_model

from lorafit.data.packing import TokenRow
from lorafit.data.row_order import RowOrder
from lorafit.distributed.ranks import Ranks
from lorafit.errors import ConfigError
from lorafit.model.lora import LoraSpec, adapted, attach
from lorafit.report.rows_of_run import data_of
from lorafit.run_dir import RunDirectory
from lorafit.training.eva import start_at_inputs
from lorafit.training.run import resume_run
from lorafit.training.without import plan_removal

RANK = 16  # half of the width: the decompositions of both are exact then


class Rows(list[TokenRow]):
    """Rows as a TokenDataset gives them."""

    def row(self, index: int) -> TokenRow:
        return self[index]

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids, _ in self]


def rows_of(count: int) -> Rows:
    random = np.random.default_rng(5)
    return Rows(
        (random.integers(0, 256, 40).astype(np.uint16), np.arange(40) >= 12 + number)
        for number in range(count)
    )


def started(rows: Rows, dtype: torch.dtype = torch.float32, **changes: Any) -> torch.nn.Module:
    network = random_network("llama", **changes).to(dtype)
    attach(network, LoraSpec(RANK, 8.0, 0.0, ("q_proj", "v_proj", "o_proj", "up_proj"), rslora=False), seed=0)
    order = RowOrder([np.arange(len(rows))], [1.0], 2, 0, shuffle=True)
    start_at_inputs(network, rows, order, Ranks())  # type: ignore[arg-type]
    return network


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-5), (torch.float32, 5e-5)], ids=str)
def test_the_start_is_that_of_peft_on_the_same_inputs(
    dtype: torch.dtype, close: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT decomposes in float32, which moves its start by up to 2e-5: with its code in float64 the bound is 1e-5."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    components = importlib.import_module("peft.utils.incremental_pca").IncrementalPCA
    fit = components.partial_fit
    monkeypatch.setattr(components, "partial_fit", lambda self, inputs: fit(self, inputs.to(dtype)))
    rows = rows_of(3)
    network = started(rows, dtype)
    ids = torch.tensor(np.stack([ids for ids, _ in rows]).astype(np.int64))
    labels = torch.full_like(ids, -100)  # peft masks positions by their labels: those that predict here
    for number, (_, trained) in enumerate(rows):
        labels[number, np.flatnonzero(trained) - 1] = 1
    config = peft.LoraConfig(
        r=RANK,
        target_modules=["q_proj", "v_proj", "o_proj", "up_proj"],
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=1.0),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(write_model(tmp_path, "llama"), dtype=dtype)
        state = peft.get_eva_state_dict(
            model, [{"input_ids": ids, "labels": labels}], config, show_progress_bar=False
        )
    linears = adapted(network)
    assert state.keys() == linears.keys()
    for name, expected in state.items():
        # in float32 the gaps between the values make the last bits of transformers' inputs larger
        found = linears[name].lora_A.detach()
        torch.testing.assert_close(found, expected.to(found.dtype), rtol=0, atol=close)
        assert not linears[name].lora_B.any()
        assert type(network.get_submodule(name)) is type(linears[name])


def test_more_ranks_than_inputs_are_refused() -> None:
    rows = Rows([(np.arange(20, dtype=np.uint16), np.arange(20) >= 10)])
    with pytest.raises(ConfigError, match="rank 16 is too large for lora.init=eva: 10 tokens of width 32"):
        started(rows)


def test_a_run_is_resumed_to_the_bit_and_its_start_counts_as_seen(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*tiny, "lora.init=eva", "data.order=hash", "train.max_steps=2", "train.save_every=1"]
    whole = tiny_run(words, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        assert not tiny_run(words, tmp_path / "run").finished
    assert digest(resume_run(tmp_path / "run", quiet=True)) == digest(whole)
    assert digest(whole) != digest(tiny_run([*words, "lora.init=default"], tmp_path / "plain"))
    run = RunDirectory.open(whole.path)
    data = data_of(run, quiet=True)
    assert (
        plan_removal(run, data, [int(data.training.numbers[0])]).untouched == 0
    )  # all rows are read at the start
