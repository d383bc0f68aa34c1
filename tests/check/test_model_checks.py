"""Stop tokens whose rows were never trained, and answers that a model would never give."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.runs import tiny_settings
from tests.tiny_models import random_network, write_model

from lorafit.check import model_checks
from lorafit.check.model_checks import answer_verdicts, never_given, stop_token_verdicts
from lorafit.config.load import load_config
from lorafit.data.build import build_data
from lorafit.data.packing import build_pack
from lorafit.data.pair_marks import documents_of
from lorafit.distributed.ranks import Ranks
from lorafit.hub.client import model_folder
from lorafit.training.answers import measured

STOP = 257  # `</s>` of the tiny tokenizer


class _Rows(list[Any]):
    def row(self, index: int) -> Any:
        return self[index]


@pytest.fixture
def rows() -> Any:
    """What is read of the training data: one row that ends in the stop token."""
    return SimpleNamespace(
        training=_Rows([(np.array([5, 6, STOP], np.uint16), np.array([False, True, True]))]),
        renderer=SimpleNamespace(contract=SimpleNamespace(stop_ids=(STOP, 258))),
        tokenizer=SimpleNamespace(decode=lambda ids: {STOP: "</s>", 258: "<|user|>"}[ids[0]]),
    )


def config_of(*words: str) -> Any:
    return load_config(None, ["model.name=m", "data.path=p", *words])


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
@pytest.mark.parametrize(
    ("table", "change", "why"),
    [
        ("embed_tokens", lambda t: t[STOP].zero_(), "is zero"),
        ("embed_tokens", lambda t: t[STOP].mul_(1e-9), "is zero"),
        ("lm_head", lambda t: t[STOP].copy_(t[259]), "equals that of token 259"),
    ],
)
def test_a_stop_token_that_was_never_trained_is_named(
    family: str, table: str, change: Any, why: str, rows: Any
) -> None:
    network = random_network(family)
    (passed,) = stop_token_verdicts(config_of(), rows, network)
    assert passed.verdict == "pass"
    with torch.no_grad():
        change((network.decoder.embed_tokens if table == "embed_tokens" else network.lm_head).weight)
    (found,) = stop_token_verdicts(config_of(), rows, network)
    name = "embedding" if table == "embed_tokens" or family == "llama-tied" else "head"
    assert (found.verdict, found.name) == ("warn", "stop token rows")
    assert found.message == f"the row of `</s>` in the {name} was never trained: it {why}"
    words = shlex.split(found.hint.partition(" trains it")[0])
    config = config_of(*words)
    assert config.lora.tokens == ("</s>",)
    assert stop_token_verdicts(config, rows, network)[0].verdict == "pass"
    assert stop_token_verdicts(config_of("lora.save_modules=[embed_tokens]"), rows, network) == []


def test_only_stop_tokens_of_the_rows_are_looked_at(rows: Any) -> None:
    network = random_network()
    with torch.no_grad():
        network.lm_head.weight[258].zero_()
    assert stop_token_verdicts(config_of(), rows, network)[0].verdict == "pass"


@given(
    st.lists(st.floats(0, 2.5), min_size=3, max_size=30),
    st.floats(0, 20),
    st.lists(st.floats(20, 40), max_size=1),
)
def test_far_answers_are_found_wherever_the_others_lie(
    usual: list[float], shift: float, far: list[float]
) -> None:
    losses = np.array([*usual, *far]) + shift
    assert never_given(losses).tolist() == [False] * len(usual) + [True] * len(far)


def test_the_rows_of_such_answers_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least likely answer by its tokens, of all documents of the packs, belongs to the row that is named."""
    rows = [
        {"prompt": f"Number {n}? ", "chosen": f"{n} it is.{'!' * (n % 3)}", "rejected": "No." * (1 + n % 2)}
        for n in range(12)
    ]
    model, path = write_model(tmp_path / "model"), tmp_path / "pairs.json"
    path.write_text(json.dumps(rows))
    words = [*tiny_settings(tmp_path, model=model), f"data.path={path}", "train.method=dpo", "data.holdout=0"]
    config = load_config(None, [*words, "train.micro_batch_tokens=64"])
    data = build_data(config, model_folder(str(model)), None, quiet=True)
    network, stored = random_network(), data.training.to_pack
    logps = measured(network, [build_pack([stored.row(at)], [at]) for at in range(12)], 12, Ranks())[:, :2]
    counts = np.array(
        [[(told[1:] > 0).sum() for *_, told in documents_of(*stored.row(at))] for at in range(12)]
    )
    expected = -logps / counts
    seen: list[float] = []

    def rule(losses: Any) -> Any:
        seen.extend(losses)
        return losses == losses.max()

    assert answer_verdicts(config, data, network)[0].verdict == "pass"
    monkeypatch.setattr(model_checks, "never_given", rule)
    (found,) = answer_verdicts(config, data, network)
    assert sorted(seen) == pytest.approx(sorted(expected.ravel()), abs=1e-5)
    row = int(expected.max(1).argmax())
    assert found.message == f"the model would never give answers of 1 of 12 rows: {data.place(row)}"
    assert answer_verdicts(load_config(None, [*words, "train.method=sft"]), data, network) == []
