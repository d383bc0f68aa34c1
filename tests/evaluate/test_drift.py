"""Drift from the base: zero without training, the divergence by the book, a limit that ends a run, an anchor."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.runs import digest, events, interrupt_after, tiny_run
from tests.tiny_models import random_network
from torch.nn import functional as F

from lorafit.data.packing import build_pack
from lorafit.evaluate.drift import PROMPTS, neutral_packs, read_answers
from lorafit.forward import divergences, pack_drift
from lorafit.model.attention import PackedDocuments
from lorafit.model.llama import Llama
from lorafit.model.lora import LoraSpec, adapted, attach
from lorafit.training.run import resume_run

MEASURE = ["run.drift=true", "train.max_steps=8", "train.eval_every=2", "train.save_every=3"]


def tuned(family: str, scale: float) -> Llama:
    """A network in float64 with an adapter that is not zero."""
    network = random_network(family, dtype=torch.float64)
    attach(network, LoraSpec(4, 8.0, 0.0, ("all-linear",), False), 0)
    generator = torch.Generator().manual_seed(1)
    for module in adapted(network).values():
        module.lora_A.data = module.lora_A.data.double()
        module.lora_B.data = scale * torch.randn(
            module.lora_B.shape, generator=generator, dtype=torch.float64
        )
    return network


def rows(count: int = 3) -> list[tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(0)
    return [(random.integers(0, 250, 9 + n), np.repeat([False, True], [5, 4 + n])) for n in range(count)]


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_the_divergence_is_that_of_whole_distributions(family: str) -> None:
    network = tuned(family, 0.3)
    with torch.inference_mode():
        found, changed = pack_drift(network, build_pack(rows()))
        zero, same = pack_drift(tuned(family, 0.0), build_pack(rows()))
    expected, different = [], []
    order = sorted(rows(), key=lambda row: row[0][: len(row[0]) - 1].tobytes())
    with torch.inference_mode():
        for ids, trained in order:
            both = []
            for enabled in (False, True):
                for module in adapted(network).values():
                    module.enabled = enabled
                hidden = network.hidden(
                    torch.from_numpy(ids), PackedDocuments((len(ids),), torch.device("cpu"))
                )
                both.append(
                    F.log_softmax(network.logits(hidden).double(), -1)[:-1][torch.from_numpy(trained[1:])]
                )
            base, now = both
            expected.append((base.exp() * (base - now)).sum(-1))
            different.append(base.argmax(-1) != now.argmax(-1))
    np.testing.assert_allclose(found, torch.cat(expected).numpy(), rtol=1e-6, atol=1e-9)
    assert changed.tolist() == torch.cat(different).tolist()
    assert found.min() >= 0
    assert found.max() > 1e-5
    assert (zero.max(), same.any()) == (0.0, False)


def test_the_anchor_has_the_gradient_of_the_divergence() -> None:
    network = tuned("llama", 0.3)
    parameter = next(iter(adapted(network).values())).lora_B.requires_grad_(True)
    pack = build_pack(rows(2))
    divergences(network, pack)[0].backward()
    assert parameter.grad is not None
    where, step = np.unravel_index(int(parameter.grad.abs().argmax()), parameter.shape), 1e-5
    sums = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter[where] += sign * step
            sums.append(float(divergences(network, pack)[0]))
            parameter[where] -= sign * step
    assert (sums[0] - sums[1]) / (2 * step) == pytest.approx(float(parameter.grad[where]), rel=1e-4)


def test_the_prompts_are_short_and_in_two_languages() -> None:
    prompts = json.loads(PROMPTS.read_text(encoding="utf-8"))
    both = [*prompts["measured"], *prompts["anchors"]]
    assert [len(prompts[kind]) for kind in ("measured", "anchors")] == [24, 24]
    assert len(set(both)) == 48  # what is trained on is not measured
    assert max(map(len, both)) < 80
    assert 20 <= sum(any("가" <= letter <= "힣" for letter in text) for text in both) <= 28


@pytest.mark.parametrize(
    "stored",
    [
        "[]",
        "{}",
        "not JSON",
        '{"measured": 1, "anchors": []}',
        '{"measured": [[[1], [999]]], "anchors": []}',
        '{"measured": [[[1], [true]]], "anchors": []}',
        '{"measured": [[[], [1]]], "anchors": []}',
        '{"measured": [[[1], [-1]]], "anchors": []}',
        '{"measured": [[[1], ["x"], [2]]], "anchors": []}',
    ],
)
def test_a_file_of_other_content_is_not_read(tmp_path: Path, stored: str) -> None:
    path = tmp_path / "drift.json"
    assert read_answers(path, 260) is None
    path.write_text(stored)
    assert read_answers(path, 260) is None


@pytest.mark.slow
def test_a_run_measures_its_drift_and_the_adapter_stays_the_same(tiny: list[str], tmp_path: Path) -> None:
    plain = tiny_run([*tiny, *MEASURE, "run.drift=false"], tmp_path / "plain")
    result = tiny_run([*tiny, *MEASURE], tmp_path / "run")
    assert digest(result) == digest(plain)
    assert not (plain.path / "drift.json").exists()
    drifts = events(result, "drift")
    assert [event["step"] for event in drifts] == [2, 4, 6, 8]
    assert 0 < drifts[0]["divergence"] < drifts[-1]["divergence"]
    assert 0 <= drifts[0]["changed"] <= 1
    page = (result.path / "report.html").read_text()
    assert "Drift from the base" in page
    assert "drift from the base" in page
    stored = read_answers(result.path / "drift.json", 260)
    assert stored is not None
    assert len(neutral_packs(stored).measured) == 6


@pytest.mark.slow
def test_above_the_limit_a_run_ends_with_the_best_adapter_before(tiny: list[str], tmp_path: Path) -> None:
    whole = tiny_run([*tiny, *MEASURE], tmp_path / "whole")
    drifts = {event["step"]: event["divergence"] for event in events(whole, "drift")}
    limit = (drifts[4] + drifts[6]) / 2
    result = tiny_run([*tiny, *MEASURE, "run.drift=false"], tmp_path / "run", f"train.max_drift={limit}")
    assert (result.finished, result.step) == (True, 6)
    assert [event["step"] for event in events(result, "heldout")] == [2, 4]
    assert json.loads((result.adapter / "manifest.json").read_text())["facts"]["step"] == 4
    assert any("moved further than" in event["text"] for event in events(result, "note"))
    assert resume_run(result.path, quiet=True).step == 6


@pytest.mark.slow
def test_an_anchor_lowers_the_drift_and_resumes_to_the_same_bytes(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = tiny_run([*tiny, *MEASURE], tmp_path / "free")
    held = tiny_run([*tiny, *MEASURE], tmp_path / "held", "train.anchor=3")
    last = [events(run, "drift")[-1]["divergence"] for run in (free, held)]
    assert last[1] < 0.7 * last[0]
    with monkeypatch.context() as patch:
        interrupt_after(5, patch)
        cut = tiny_run([*tiny, *MEASURE], tmp_path / "cut", "train.anchor=3")
    assert digest(resume_run(cut.path, quiet=True)) == digest(held)
