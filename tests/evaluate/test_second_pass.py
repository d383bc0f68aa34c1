"""`lorafit rows --second-pass`: losses with the question and without it are those of one row per pass by the base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.command import Cli
from tests.runs import tiny_run, tiny_settings

from lorafit.data.packing import build_pack
from lorafit.evaluate.second_pass import before_answers
from lorafit.forward import pack_losses
from lorafit.infer.model import load
from lorafit.model.lora import disable_adapter
from lorafit.observe.answer_losses import read_answer_losses
from lorafit.report.rows_of_run import data_of
from lorafit.run_dir import RunDirectory


@pytest.fixture(scope="module")
def trained(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small real model, of which one answer belongs to another question."""
    folder = tmp_path_factory.mktemp("second")
    settings = tiny_settings(folder, model=shared / "models/tinystories-656k", num_rows=30)
    return tiny_run(
        [*settings, "train.max_steps=5", "data.holdout=5", "train.refit=false"], folder / "run"
    ).path


def test_losses_are_those_of_one_row_per_pass_by_the_base(trained: Path, cli: Cli) -> None:
    head, *listed = map(
        json.loads, cli("rows", trained, "--second-pass", "--top", "0", "--json").out.splitlines()
    )
    run = RunDirectory.open(trained)
    data, model = data_of(run, quiet=True), load(trained)
    before = before_answers(model)
    assert head["rows"] == len(listed) == len(data.training) < 30
    losses = read_answer_losses(run.answer_losses_file, data.digest())
    assert losses is not None
    assert len(losses.rows) == 30  # held-out rows too
    for index in range(30):
        ids, mask = data.encoded.row(index)
        trained_at = mask.astype(bool)
        first = int(trained_at.argmax())
        alone = np.array([*before, *ids[first:]], ids.dtype)
        with disable_adapter(model.network), torch.inference_mode():
            asked = pack_losses(model.network, build_pack([(ids, trained_at)]))[1].numpy()
            mask = np.arange(len(alone)) >= len(before)
            mask[len(before) :] = trained_at[first:]
            unasked = pack_losses(model.network, build_pack([(alone, mask)]))[1].numpy()
        at = int(np.searchsorted(losses.rows, data.encoded.number(index)))
        assert losses.asked[at] == pytest.approx(asked[:-1].mean(), abs=1e-4)
        assert losses.alone[at] == pytest.approx(unasked[:-1].mean(), abs=1e-4)
        assert losses.end[at] == pytest.approx(asked[-1], abs=1e-4)
    by_row = {row["row"]: row for row in listed}
    assert all(
        by_row[number + 1]["asked"] == round(float(losses.asked[number]), 4)
        for number in range(30)
        if number + 1 in by_row
    )


def test_the_list_and_the_page_keep_the_second_pass(trained: Path, tmp_path: Path, cli: Cli) -> None:
    shutil.copytree(trained, run := tmp_path / "run")
    (run / "answer_losses.safetensors").unlink(missing_ok=True)
    plain = cli("rows", run)
    assert "--second-pass" in plain.err
    first = cli("rows", run, "--second-pass")
    again = cli("rows", run)
    assert first.out == again.out != plain.out
    assert "--second-pass" not in again.err
    reasons = [row["reason"] for row in json.loads((run / "row_list.json").read_text())["rows"]]
    assert any("the question helps the answer little" in reason for reason in reasons)


def test_a_run_of_preferences_is_refused(trained: Path, tmp_path: Path, cli: Cli) -> None:
    shutil.copytree(trained, run := tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("method: sft", "method: dpo"))
    refused = cli("rows", run, "--second-pass")
    assert refused.code == 2
