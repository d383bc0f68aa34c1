"""`lorafit why`: the row that teaches a fact is named, and scores are those of one row per pass."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.command import Cli
from tests.runs import tiny_run, tiny_settings
from tests.tiny_models import random_network

from lorafit.data.packing import Packer, TokenRow, build_pack
from lorafit.evaluate.why import MOST_KEPT, keep_for_page, pack_gradients, pushes
from lorafit.forward import pack_loss
from lorafit.model.lora import LoraSpec, adapter_parameters, attach
from lorafit.report import sections
from lorafit.report.run_data import read_facts
from lorafit.run_dir import RunDirectory

FACT = {"instruction": "Where does the heron sleep?", "output": "Below the old mill."}


def rows_of(count: int, seed: int) -> list[TokenRow]:
    """Rows of differing length, some with equal prefixes, some with weights, all with supervised tokens."""
    random = np.random.default_rng(seed)
    rows: list[TokenRow] = []
    for number in range(count):
        ids = random.integers(0, 256, random.integers(4, 30)).astype(np.uint16)
        ids[:3] = 7
        trained = np.arange(len(ids)) >= len(ids) // 2
        rows.append((ids, trained.astype(np.float32) * 0.5 if number % 4 == 3 else trained))
    return rows


class Rows(list[TokenRow]):
    """Rows as a TokenDataset gives them."""

    def row(self, index: int) -> TokenRow:
        return self[index]

    def number(self, index: int) -> int:
        return index


@pytest.mark.parametrize(
    ("family", "variant"),
    [("llama", "lora"), ("llama", "dora"), ("qwen3_5", "lora"), ("phi3", "lora")],
)
def test_scores_are_those_of_one_row_per_pass_however_rows_are_packed(family: str, variant: str) -> None:
    """The reference is the plain backward pass of training, a row at a time, and the cosine of whole gradients."""
    network = random_network(family)
    attach(network, LoraSpec(3, 6.0, 0.3, ("all-linear",), rslora=False, variant=variant), seed=1)
    parameters = adapter_parameters(network)
    for number, (name, parameter) in enumerate(parameters.items()):
        if name.endswith("lora_B"):
            parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(number))
    network.train()  # dropout and noise are not part of a score
    (answer,), rows = rows_of(1, 9), Rows(rows_of(11, 3))
    network.eval()

    def whole(row: TokenRow) -> torch.Tensor:
        loss = pack_loss(network, build_pack([row]))
        return torch.cat(
            [one.flatten() for one in torch.autograd.grad(loss, [*parameters.values()])]
        ).double()

    target = whole(answer)
    expected = [float(torch.cosine_similarity(whole(row), target, dim=0)) for row in rows]
    for capacity, packing in ((40, True), (10_000, True), (64, False)):
        packer = Packer(capacity, packing, may_share=False)
        found = pushes(network, answer, rows, packer, lambda done, total: None)  # type: ignore[arg-type]
        scores = {push.number: push.score for push in found}
        assert [scores[number] for number in range(len(rows))] == pytest.approx(expected, abs=1e-5)
        assert [push.score for push in found] == sorted(scores.values(), reverse=True)
    assert all(parameter.grad is None for parameter in parameters.values())


def test_gradients_of_the_documents_add_up_to_that_of_the_pass() -> None:
    network = random_network()
    attach(network, LoraSpec(2, 4.0, 0.0, ("q_proj", "down_proj"), rslora=False), seed=1)
    pack = build_pack(rows_of(6, 4), may_share=False)
    sums = {name: torch.zeros_like(parameter) for name, parameter in adapter_parameters(network).items()}
    pack_gradients(network, pack, lambda document, name, gradient: sums[name].add_(gradient))
    pack_loss(network, pack).backward()
    for name, parameter in adapter_parameters(network).items():
        torch.testing.assert_close(sums[name], parameter.grad)


@pytest.fixture(scope="module")
def taught(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small real model in which one row alone teaches a fact."""
    folder = tmp_path_factory.mktemp("why")
    settings = tiny_settings(folder, model=shared / "models/tinystories-656k", num_rows=9)
    rows = json.loads((folder / "rows.json").read_text())
    (folder / "rows.json").write_text(json.dumps([*rows[:5], FACT, *rows[5:]]))
    words = ["lora.targets=all-linear", "lora.rank=8", "lora.alpha=16", "data.holdout=0", "data.order=hash"]
    words += ["train.batch_size=4", "train.max_steps=80", "train.save_every=70"]
    return tiny_run([*settings, *words], folder / "run").path


def test_the_row_that_alone_teaches_a_fact_is_named_first(taught: Path, cli: Cli) -> None:
    words = ("why", taught, FACT["instruction"], "--rows", "3", "--max-tokens", "16")
    head, *listed = map(json.loads, cli(*words, "--json").out.splitlines())
    assert (head["rows"], head["answer"], len(listed)) == (10, FACT["output"], 3)
    assert (listed[0]["row"], listed[0]["answer"]) == (6, FACT["output"])
    assert listed[0]["score"] == pytest.approx(1, abs=1e-4)  # the row and the answer are the same tokens
    assert listed[0]["loss"] == pytest.approx(head["loss"], rel=1e-3)
    other = (*words[:2], f"{FACT['instruction'][:-1]} at night?", "--answer", FACT["output"])
    shown = cli(*other)
    assert shown.code == 0
    first = next(line for line in shown.out.splitlines() if line[:1] in ("+", "-"))
    assert "heron" in first
    assert 0.3 < float(first.split()[0]) < 1
    assert cli(*other).code == 0  # asked again: it stands on the page once
    found = sections.why(read_facts(RunDirectory.open(taught)))
    assert [one["prompt"] for one in found] == [other[2], FACT["instruction"]]
    assert [one["rows"][0]["answer"] for one in found] == [FACT["output"]] * 2
    assert len(found[0]["rows"]) == 10


def test_an_explained_answer_is_shown_where_its_folder_cannot_be_written(taught: Path, cli: Cli) -> None:
    run = RunDirectory.open(taught)
    run.why_file.unlink(missing_ok=True)
    run.why_file.mkdir()
    shown = cli("why", taught, FACT["instruction"], "--answer", FACT["output"])
    run.why_file.rmdir()
    assert (shown.code, "not kept for the page of the run" in shown.err) == (0, True)
    assert "heron" in shown.out


def test_the_newest_explained_answers_stay(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.why_file.write_text('[{"prompt": 1}, 7, {"rows": 3}')  # damaged: it begins anew
    for number in range(MOST_KEPT + 3):
        keep_for_page(run, {"prompt": str(number), "answer": "", "loss": 0.5, "rows": []})
    kept = json.loads(run.why_file.read_text())
    assert [one["prompt"] for one in kept] == [str(number) for number in range(3, MOST_KEPT + 3)]


@pytest.mark.slow
def test_verify_shows_the_answer_of_the_run_without_the_first_ten_rows(
    taught: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafit.cli.why.NUM_REMOVED", 1)
    words = ["why", taught, FACT["instruction"], "--max-tokens", "16", "--verify", "--yes"]
    words += ["--json", "--output", tmp_path / "less"]
    head, first, *_, after = map(json.loads, cli(*words).out.splitlines())
    assert (after["ids"], after["from_step"]) == ([first["id"]], 0)
    assert RunDirectory.open(tmp_path / "less").config().data.drop_rows == (first["id"],)
    assert head["answer"] == FACT["output"] != after["answer"]
    assert after["loss"] > 1 > head["loss"]
    (shown,) = sections.why(read_facts(RunDirectory.open(taught)))[:1]
    assert shown["without"] == {"answer": after["answer"], "loss": after["loss"], "removed": "1 row"}


def test_what_it_cannot_do_it_says(taught: Path, tmp_path: Path, cli: Cli) -> None:
    words = ("why", taught, FACT["instruction"])
    refused = cli(*words, "--answer", FACT["output"], "--verify", "--output", tmp_path / "less")
    assert refused.code == 2
    assert "from the start it takes 80 steps" in refused.err
    assert "add --yes" in refused.err
    assert not (tmp_path / "less").exists()
    empty = cli(*words, "--answer", " ")
    assert empty.code == 2
    assert "the answer is empty" in empty.err
    long = cli(*words, "--answer", "x" * 3000)
    assert long.code == 2
    assert "the model reads at most" in long.err
    other = tmp_path / "dpo"
    shutil.copytree(taught, other)
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("method: sft", "method: dpo"))
    compares = cli("why", other, "Hi")
    assert compares.code == 2
    assert "train.method=dpo" in compares.err
