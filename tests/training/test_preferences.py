"""Methods that compare answers: their losses, their reference, and what a run of them writes, resumes and measures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.runs import digest, events, tiny_run
from tests.tiny_models import random_network, write_model

from lorafit.config.auto import without_auto
from lorafit.config.load import load_config
from lorafit.data.batch import RankShare
from lorafit.data.build import build_data, sizes_of
from lorafit.data.ledger import Ledger
from lorafit.data.packing import Packer, build_pack
from lorafit.distributed.ranks import Ranks
from lorafit.errors import ConfigError, DataError
from lorafit.forward import pack_loss
from lorafit.hub.client import model_folder
from lorafit.model.lora import LoraSpec, adapted, attach
from lorafit.report.page import tiles
from lorafit.report.run_data import read_facts
from lorafit.run_dir import RunDirectory
from lorafit.training.answers import measured, mismatched
from lorafit.training.objective import OBJECTIVES, Passes
from lorafit.training.preferences import Settings
from lorafit.training.reference import Reference

PAIRS = [
    {"prompt": f"Number {n}? ", "chosen": f"{n} it is.{'!' * (n % 4)}", "rejected": f"{n}?{'.' * (n % 5)} No"}
    for n in range(40)
]
METHODS = [name for name in OBJECTIVES if name != "sft"]


def settings_of(folder: Path, rows: list[dict[str, Any]], *more: str) -> list[str]:
    (folder / "pairs.json").write_text(json.dumps(rows))
    return [
        *(f"model.name={folder / 'model'}", f"data.path={folder / 'pairs.json'}", "model.dtype=float32"),
        *("model.device=cpu", "lora.rank=4", "train.batch_size=6", "train.learning_rate=0.01"),
        *("train.max_steps=4", "train.eval_every=2", "run.samples=0", "run.verify=false", "run.check=none"),
        *more,
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("preferences")
    write_model(made / "model")
    return made


def adapter(network: Any, seed: int) -> None:
    """The numbers of another adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapted(network).values():
            layer.lora_B.copy_(
                0.05 * torch.randn(layer.lora_B.shape, generator=generator, dtype=torch.float64)
            )


@pytest.fixture(scope="module")
def jobs(folder: Path) -> dict[str, Any]:
    """What the passes of a step need, of each method: a network that has left its starting point."""
    network = random_network(dtype=torch.float64)
    attach(network, LoraSpec(2, 4, 0.0, ("all-linear",), False), seed=0)
    adapter(network, 1)
    made = {}
    for method in METHODS:
        smooth = ["train.label_smoothing=0.1"] if method in ("dpo", "simpo") else []
        words = settings_of(folder, PAIRS, f"train.method={method}", *smooth)
        config = load_config(None, words)
        data = build_data(config, model_folder(str(folder / "model")), None, quiet=True)
        config = without_auto(config, sizes_of(data, None))
        packer, stored = Packer(100_000), data.training.to_pack
        rows = [stored.row(index) for index in range(len(data.training))]
        values = np.full((len(data.encoded), 4), np.nan)
        places = [data.training.place(index) for index in range(len(rows))]
        values[places, :3] = measured(network, packer.packs(rows), len(rows), Ranks())
        flat = data.training.flat
        others = [mismatched(flat.row(at), flat.row((at + 1) % len(data.encoded)), 2048) for at in places]
        values[places, 3] = measured(network, packer.packs(others), len(rows), Ranks())[:, 0]
        made[method] = SimpleNamespace(
            config=config, data=data, rows=data.training, packer=packer, ranks=Ranks(), network=network,
            reference=Reference(values, "", {}), is_late=False,
        )  # fmt: skip
    adapter(network, 2)
    return made


def step(job: Any, packer: Packer, indices: np.ndarray[Any, Any], world_size: int = 1) -> Any:
    """(loss, gradient) of a step over all ranks, as the loop computes them."""
    for layer in adapted(job.network).values():
        layer.lora_A.grad = layer.lora_B.grad = None
    total = 0.0
    for rank in range(world_size):
        batch = RankShare(rank, world_size).of(job.rows.to_pack, indices, packer)
        assert batch.weight == len(indices)
        compute = Passes(job, batch)
        for pack in batch.packs:
            if pack.num_tokens:
                loss, _ = compute(job.network, pack)
                (loss / batch.weight).backward()
                total += float(loss.detach()) / batch.weight
    layers = adapted(job.network).items()
    return total, {name: layer.lora_A.grad.clone() for name, layer in layers}


@settings(max_examples=4)
@given(
    capacity=st.sampled_from([20, 64, 300]),
    packing=st.booleans(),
    world_size=st.integers(1, 3),
)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_does_not_depend_on_how_it_is_cut(
    jobs: dict[str, Any], method: str, capacity: int, packing: bool, world_size: int
) -> None:
    job, indices = jobs[method], np.array([5, 1, 30])
    loss, gradients = step(job, Packer(100_000), indices)
    again, others = step(job, Packer(capacity, packing), indices, world_size)
    assert again == pytest.approx(loss, abs=1e-10)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-8, atol=1e-12)


def by_hand(job: Any, method: str, indices: list[int]) -> float:
    """The loss of a step from passes over each answer by itself, with the formulas of the papers."""
    own = Settings.of(job.config.train)

    def sigmoid(value: float) -> float:
        return 1 / (1 + math.exp(-value))

    losses, tokens, nll = [], 0, 0.0
    places = [job.rows.place(index) for index in indices]
    flat = job.rows.flat
    kl = [
        -float(
            pack_loss(
                job.network, build_pack([mismatched(flat.row(at), flat.row((at + 1) % 40), 2048)])
            ).detach()
        )
        - job.reference.values[at, 3]
        for at in places
    ]
    z = own.beta * max(0.0, sum(kl) / len(kl))
    for at in places:
        ids, marks = flat.row(at)
        logps, means = [], []
        for side, other in ((2, 4), (4, 2)):
            kept = (marks & other) == 0
            row = (ids[kept], ((marks[kept] & 1) > 0) & ((marks[kept] & side) > 0))
            logps.append(-float(pack_loss(job.network, build_pack([row])).detach()))
            means.append(logps[-1] / int(row[1].sum()))
        tokens += int(((marks & 3) == 3).sum())
        nll -= logps[0]
        start = job.reference.values[at, :2]
        margin = own.beta * ((logps[0] - start[0]) - (logps[1] - start[1]))
        if method == "simpo":
            margin = own.beta * (means[0] - means[1]) - own.simpo_gamma
        if method in ("dpo", "simpo"):
            e = own.label_smoothing
            losses.append(-(1 - e) * math.log(sigmoid(margin)) - e * math.log(sigmoid(-margin)))
        elif method == "orpo":
            odds = [math.exp(mean) / (1 - math.exp(mean)) for mean in means]
            losses.append(-own.beta * math.log(sigmoid(math.log(odds[0] / odds[1]))))
        else:
            good, bad = (own.beta * (logp - first) for logp, first in zip(logps, start, strict=True))
            losses.append((1 - sigmoid(good - z) + 1 - sigmoid(z - bad)) / 2)
    return sum(losses) / len(losses) + (nll / tokens if method == "orpo" else 0.0)


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_is_the_formula_of_its_paper(jobs: dict[str, Any], method: str) -> None:
    indices = [3, 4, 20]
    loss, _ = step(jobs[method], Packer(64), np.array(indices))
    assert loss == pytest.approx(by_hand(jobs[method], method, indices), abs=1e-8)


def test_a_prompt_is_computed_and_counted_once(jobs: dict[str, Any]) -> None:
    data = jobs["dpo"].data
    (pack,) = Packer(100_000).packs([data.training.to_pack.row(0)])
    ids, marks = data.training.to_pack.row(0)
    answers = [(marks & side) > 0 for side in (2, 4)]
    prompt = int((~answers[0] & ~answers[1]).sum())
    shared = sum(pack.lengths) - len(pack.ids)
    assert shared >= prompt > 5  # the answers themselves begin alike
    assert pack.num_tokens == len(ids) == prompt + answers[0].sum() + answers[1].sum()
    assert pack.weight == 1
    ledger: Ledger = data.ledger
    assert ledger.pairs["pairs"] == 40
    assert ledger.trained.total + ledger.held_out.total == ledger.pairs["computed"]
    saved = sum(int(((marks & 6) == 0).sum()) for _, marks in map(data.encoded.to_pack.row, range(40)))
    assert ledger.pairs["separate"] - ledger.pairs["computed"] == saved
    text, trained = data.training.row(0)  # for whatever is not about pairs: the chosen answer
    number = data.training.number(0)
    assert (
        data.tokenizer.decode(text[trained].tolist()).removesuffix("</s>").strip() == PAIRS[number]["chosen"]
    )


@pytest.fixture(scope="module")
def dpo_run(folder: Path) -> Any:
    return tiny_run(settings_of(folder, PAIRS, "train.method=dpo", "train.save_every=2"), folder / "dpo")


def test_a_run_starts_at_log_two_and_leaves_its_reference(dpo_run: Any) -> None:
    steps = events(dpo_run, "step")
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert steps[-1]["loss"] < 0.9 * math.log(2)
    first, *_, last = (event for event in events(dpo_run, "preferences") if event["rows"] == "train")
    assert first["margin"] == pytest.approx(0, abs=1e-5)
    assert last["margin"] > 0.1
    measured_at = events(dpo_run, "heldout")
    assert [event["base_loss"] for event in measured_at] == [pytest.approx(math.log(2))] * 2
    assert dpo_run.heldout_loss == min(event["loss"] for event in measured_at)


def test_the_page_shows_margin_order_and_drift(dpo_run: Any) -> None:
    """Each figure is that of the last held-out measurement; the drift is from the starting point."""
    told = [event for event in events(dpo_run, "preferences") if event["rows"] == "heldout"][-1]
    shown = {tile["label"]: tile["value"] for tile in tiles(read_facts(RunDirectory.open(dpo_run.path)))}
    assert shown["held-out pairs in order"] == f"{told['accuracy']:.0%}"
    assert shown["reward margin"] == f"{told['margin']:.2f}"
    assert told["drift"] > 0
    assert shown["drift from the start"] == f"{told['drift']:.3f}"


def test_a_run_from_an_adapter_has_that_adapter_as_its_reference(folder: Path, dpo_run: Any) -> None:
    words = settings_of(
        folder, PAIRS, "train.method=dpo", f"lora.init_from={dpo_run.adapter}", "train.max_steps=1"
    )
    again = tiny_run(words, folder / "again")
    assert events(again, "step")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert digest(again) != digest(dpo_run)


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_run_resumes_to_the_same_bytes(
    folder: Path, method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lorafit.training import loop
    from lorafit.training.run import resume_run

    words = settings_of(folder, PAIRS, f"train.method={method}", "train.save_every=2")
    whole = tiny_run(words, tmp_path / "whole")
    real = loop._gradients

    def stopped(job: Any, state: Any, batch: Any) -> Any:
        if state.step == 3:
            raise RuntimeError("killed")
        return real(job, state, batch)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(loop, "_gradients", stopped)
        tiny_run(words, tmp_path / "cut")
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "empty"))  # the reference is computed again
    resumed = resume_run(tmp_path / "cut", quiet=True)
    assert resumed.finished
    assert digest(resumed) == digest(whole)
    assert [e["loss"] for e in events(resumed, "step")] == [e["loss"] for e in events(whole, "step")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.method=dpo", "data.format=alpaca"], "not alpaca"),
        (["data.format=preference"], "needs `train.method`"),
        (["train.method=dpo", "train.simpo_gamma=1"], "`train.simpo_gamma` is a key of `train.method` simpo"),
        (["train.beta=0.2"], "`train.beta` is a key"),
        (["train.method=kto", "data.train_on=all"], "`data.train_on=all` adds nothing"),
        (["train.method=dpo", "data.too_long=split"], "is for texts"),
        (["train.method=dpo", "distributed.strategy=fsdp"], "is not computed with"),
        (["train.method=dpo", "train.loss_type=sigmoid_norm", "train.label_smoothing=0.1"], "has no"),
    ],
)
def test_a_key_that_a_method_does_not_read_is_an_error(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, ["model.name=m", "data.path=p", *words])


def test_rows_that_a_method_cannot_learn_from_are_an_error(folder: Path) -> None:
    single = [{"prompt": "a", "completion": "b", "label": True}] * 30
    base = model_folder(str(folder / "model"))
    with pytest.raises(DataError, match="30 rows have one"):
        build_data(load_config(None, settings_of(folder, single, "train.method=dpo")), base, None, quiet=True)
    with pytest.raises(DataError, match=r"`chosen` and `rejected`") as caught:
        build_data(load_config(None, settings_of(folder, PAIRS)), base, None, quiet=True)
    assert "train.method=dpo" in caught.value.problems[0].hint


def test_single_answers_teach_kto(folder: Path) -> None:
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen" if at % 3 else "rejected"], "label": at % 3 > 0}
        for at, row in enumerate(PAIRS)
    ]
    run = tiny_run(settings_of(folder, rows, "train.method=kto"), folder / "kto")
    assert events(run, "step")[0]["loss"] == pytest.approx(0.5, abs=1e-6)
    assert run.heldout_loss is not None
    assert run.heldout_loss < 0.5
