"""What an export may cost: answers, loss and most probable tokens, and what is done with one that costs more.

Scores are made up here: the program that reads exports is the subject of test_gguf.py and test_faults.py.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.command import Cli

from lorafit.errors import RunError
from lorafit.export import gguf_model, parity
from lorafit.export.fit import fit_run
from lorafit.export.llama_cpp import token_threads
from lorafit.export.number_types import TYPES
from lorafit.export.parity import cost_of
from lorafit.export.reference import Prompt, Reference, Scores
from lorafit.export.rows import RowTexts, Text
from lorafit.export.run import export_run

ANSWER, SCORED = 16, 400


def made(scored: float = -1.0, others: int = 0, tie: float = 1.0) -> Scores:
    """Every token has the log-probability `scored`; at the first `others`, another one is more probable by `tie`."""
    best = torch.zeros(SCORED, dtype=torch.int64)
    best[:others] = 1
    margin = torch.where(best > 0, tie, 0.0)
    own = torch.full((SCORED,), scored)
    return Scores(own, best, own + margin, torch.zeros(3))


def reference() -> Reference:
    prompt = Prompt((), "text", [1], [0] * ANSWER)
    rows = RowTexts([Text([0] * 385, range(1, 385))], "held-out rows")
    return Reference([prompt], rows, made(), None, "float32", False, 20.0, {})


def test_the_loss_is_that_of_the_rows_and_its_rise_a_share() -> None:
    cost, distance = cost_of(reference(), TYPES["q8_0"], made(-1.1))
    assert (cost.equal, cost.tied, cost.agreement, distance) == (1, 0, 1.0, None)
    assert cost.rise == pytest.approx(0.1)
    assert cost.certain_rise == pytest.approx(0.1)


def test_a_rise_that_few_tokens_show_by_chance_is_not_certain() -> None:
    scores = made()
    scores.scored[ANSWER::2] -= 2.0
    scores.scored[ANSWER + 1 :: 2] += 1.96
    cost, _ = cost_of(reference(), TYPES["q8_0"], scores)
    assert cost.rise == pytest.approx(0.02)
    assert cost.certain_rise < 0


def test_another_first_token_is_no_equal_answer_and_a_tie_only_without_blocks() -> None:
    for name, tied in (("q8_0", 0), ("f32", 1)):
        cost, _ = cost_of(reference(), TYPES[name], made(others=1, tie=1e-4))
        assert (cost.equal, cost.tied) == (0, tied)
    cost, _ = cost_of(reference(), TYPES["f32"], made(others=1, tie=0.5))
    assert (cost.equal, cost.tied) == (0, 0)


def faked(monkeypatch: pytest.MonkeyPatch, change: Callable[[Path, Scores], Scores]) -> None:
    """Have exports read back by nobody: the scores are the adapter's, with a change."""

    def read_back(source: Any, reference: Reference, export: Any, folder: Path, *rest: Any) -> Any:
        prompts = [{"text": prompt.text, "ids": prompt.ids} for prompt in reference.prompts]
        result = {
            "program": "a test",
            "prompts": prompts,
            "stops": {},
            "answers": [],
            "tokens_per_second": 1.0,
        }
        return result, change(folder, reference.live)

    monkeypatch.setattr(parity, "read_back", read_back)


def worse(by: float) -> Callable[[Path, Scores], Scores]:
    return lambda folder, live: dataclasses.replace(live, scored=live.scored - by)


def test_an_export_that_costs_too_much_is_refused_and_says_what(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faked(monkeypatch, worse(0.5))
    with pytest.raises(RunError, match=r"the loss rises from .* a q4_0 export may cost 4.0%") as caught:
        export_run(finished_run, "gguf", type_name="q4_0", output=tmp_path / "out")
    assert "--fit" in str(caught.value)
    faked(monkeypatch, lambda folder, live: dataclasses.replace(live, best=live.best + 1))
    with pytest.raises(RunError, match=r"the most probable token is the adapter's at 0.0% of"):
        export_run(finished_run, "gguf", type_name="q4_0", output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("gib", "threads"), [(0.1, 1), (0.5, 1), (1.1, 2), (2.2, 3), (30, 8)])
def test_passes_of_one_token_have_a_thread_per_gib_of_weights(gib: float, threads: int) -> None:
    weights = int(gib * 2**30)
    assert token_threads(weights, 8) == threads
    assert token_threads(weights, 1) == 1  # never more than are asked for


def test_ollama_gets_the_file_of_a_verified_gguf_export(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    faked(monkeypatch, worse(0.0))
    first = export_run(run, "gguf", type_name="q8_0")
    with monkeypatch.context() as once:
        once.setattr(gguf_model, "write_gguf", None)
        once.setattr(parity, "read_back", None)
        second = export_run(run, "ollama", type_name="q8_0")
    assert second.parity == first.parity
    assert (second.path / "model.gguf").read_bytes() == (first.path / "run-q8_0.gguf").read_bytes()
    assert (second.path / "Modelfile").is_file()
    (first.path / "run-q8_0.gguf").write_bytes(b"damaged")
    with pytest.raises(TypeError):  # it is written again, which this test does not allow
        monkeypatch.setattr(gguf_model, "write_gguf", None)
        export_run(run, "ollama", type_name="q8_0", output=tmp_path / "other")


def test_fit_keeps_the_smallest_type_within_the_bound_and_leaves_nothing_else(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    costs = {"q4_0": 0.001, "q2_k": 2.0, "q3_k_m": 0.5}

    def change(folder: Path, live: Scores) -> Scores:
        name = next(folder.glob("*.gguf")).stem.split("-")[-1]
        return dataclasses.replace(live, scored=live.scored - costs.get(name, 0.4))

    faked(monkeypatch, change)
    done, tried = fit_run(finished_run, "gguf", output=tmp_path / "out")
    assert done is not None
    assert done.type == "q4_0"
    assert [one.type for one in tried] == ["q2_k", "q3_k_m", "q3_k_l", "iq4_xs", "q4_0"]
    assert [bool(one.fault) for one in tried] == [True] * 4 + [False]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    code, out, err = cli(
        "export", finished_run, "gguf", "--fit", "--max-loss", "0%", "--output", tmp_path / "no"
    )
    assert (code, out) == (2, "")
    assert "no type with blocks keeps the loss within 0.00%" in err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("merged", "--fit"), "a merged export has no types to choose from"),
        (("gguf", "--fit", "--type", "q8_0"), "--fit chooses the type"),
        (("gguf", "--max-loss", "1%"), "--max-loss and --tasks need --fit"),
        (("gguf", "--fit", "--max-loss", "much"), "`much` is not a share"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    words: tuple[str, ...], said: str, finished_run: Path, cli: Cli
) -> None:
    code, _, err = cli("export", finished_run, *words)
    assert code == 2
    assert said in err
