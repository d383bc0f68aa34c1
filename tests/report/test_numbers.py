"""A number of a run is the same wherever it is shown: terminal, metrics, runs, report, card, ledger, check, plan."""

from __future__ import annotations

import contextlib
import io
import json
import re
from dataclasses import dataclass
from html.parser import HTMLParser

import pytest
from tests.export.made import source_of
from tests.runs import events, tiny_settings

from lorafit.check.run import check_run
from lorafit.config.load import load_config
from lorafit.data.contract import begins_with
from lorafit.data.ledger import Ledger
from lorafit.export.card import card
from lorafit.export.kinds import EXPORTS
from lorafit.observe.run_summary import summarize
from lorafit.observe.units import short_count
from lorafit.plan.planner import plan_run
from lorafit.plan.table import table_rows
from lorafit.report.page import page
from lorafit.report.run_data import read_facts
from lorafit.run_dir import RunDirectory
from lorafit.training.run import Result, start_run


@dataclass(frozen=True)
class Places:
    """One run in every place that shows it, as text."""

    result: Result
    terminal: str
    runs: list[str]
    report: str
    card: str
    check: dict[str, str]
    plan: dict[str, str]


def words_of(html: str) -> str:
    parts: list[str] = []
    parser = HTMLParser()
    parser.handle_data = parts.append  # type: ignore[method-assign]
    parser.feed(html)
    return " ".join("".join(parts).split())


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    folder = tmp_path_factory.mktemp("numbers")
    pace = (
        "train.batch_size=7",
        "train.epochs=3",
        "train.log_every=1",
        "train.eval_every=5",
        "run.check=warn",
    )
    words = [*tiny_settings(folder, num_rows=60), *pace, f"run.output={folder / 'run'}"]
    config = load_config(None, words)
    with contextlib.redirect_stderr(io.StringIO()) as terminal:
        result = start_run(config)
    run = RunDirectory.open(result.path)
    return Places(
        result,
        terminal.getvalue(),
        summarize(run).cells(),
        words_of(page(read_facts(run))),
        card(source_of(run.path), EXPORTS["adapter"], "f32", run.path, {"verified": False, "why": "-"}),
        {verdict.name: verdict.text for verdict in check_run(config, quiet=True).verdicts},
        {what: f"{how_much} {more}" for what, how_much, more in table_rows(plan_run(config, quiet=True))},
    )


def test_steps_and_epochs(places: Places) -> None:
    num_steps = places.result.step
    assert num_steps == 3 * 8  # 54 rows of 60, in steps of 7; the last step of an epoch is short
    assert events(places.result, "step")[-1]["epoch"] == 3
    assert f"{num_steps} steps of 7 rows, 3 epochs" in places.check["steps"]
    assert f"step {num_steps}/{num_steps}" in places.terminal
    assert f"{num_steps} of {num_steps}" in places.report
    assert f"{num_steps}/{num_steps}" in places.runs
    assert places.plan["steps"].startswith(f"{num_steps} ")
    assert f"| {num_steps} |" in places.card


def test_rows_and_tokens(places: Places) -> None:
    ledger = Ledger.from_json(json.loads((places.result.path / "ledger.json").read_text()))
    assert (ledger.trained.rows, ledger.held_out.rows) == (54, 6)
    for text in (places.terminal, places.check["ledger"], places.card):
        assert ledger.row_sum in text
        squeezed = " ".join(text.split())
        assert f"tokens {ledger.trained.total:,} = {ledger.trained.trained:,} trained" in squeezed
        assert f"held out: {ledger.held_out.total:,} = {ledger.held_out.trained:,} trained" in squeezed
    assert str(ledger.lengths) in places.check["lengths"]
    assert str(ledger.lengths) in places.terminal
    assert f"{ledger.trained.trained:,} per epoch" in places.check["supervised share"]
    per_epoch = f"{ledger.trained.trained:,} of {ledger.trained.total:,} per epoch"
    assert per_epoch in places.plan["supervised tokens"]
    assert places.plan["rows"].startswith("54 ")
    for tokens in (ledger.trained, ledger.held_out):
        assert f"trained{tokens.trained:,}" in places.report.replace(" ", "")
    steps = events(places.result, "step")
    supervised, tokens = (sum(step[key] for step in steps) for key in ("supervised_tokens", "tokens"))
    assert (supervised, tokens) == (3 * ledger.trained.trained, 3 * ledger.trained.total)
    assert places.plan["supervised tokens"].startswith(f"{supervised:,} ")
    assert places.plan["tokens"].startswith(f"{tokens:,} ")
    assert f"{short_count(supervised)} of {short_count(tokens)}" in places.report


def test_losses(places: Places) -> None:
    steps, heldout = events(places.result, "step"), events(places.result, "heldout")
    shown = re.findall(r"^step (\d+)/\d+  loss ([0-9.]+)", places.terminal, re.MULTILINE)
    assert shown == [(str(step["step"]), f"{step['loss']:.3f}") for step in steps]
    lowest, base = min(event["loss"] for event in heldout), heldout[-1]["base_loss"]
    assert places.runs[3:6] == [f"{steps[-1]['loss']:.3f}", f"{lowest:.3f}", f"{base:.3f}"]
    assert f"held-out loss {lowest:.3f} (base {base:.3f})" in places.terminal
    assert f"{base:.3f} → {lowest:.3f}" in places.report
    assert f"{lowest:.4f} (base {base:.4f})" in places.card
    assert f"{steps[-1]['loss']:.4f}" in places.card


def test_what_was_learned(places: Places) -> None:
    (event,) = events(places.result, "learned")
    assert event["text"] in places.terminal
    assert event["text"] in places.report
    assert event["level"] in places.runs


def test_how_rows_begin(places: Places) -> None:
    contract = json.loads((places.result.path / "prompt.json").read_text())
    begins = begins_with(contract["bos"], contract["add_bos"])
    assert f"rows begin with {begins}" in places.check["BOS"]
    assert f"begins with | {begins}" in places.card.replace("`", "")
    assert f"begins with{begins}" in places.report


@pytest.mark.parametrize(
    ("bos", "adds", "said"),
    [
        ("<s>", True, "<s>, once"),
        ("<|im_start|>", False, "what the template writes: the tokenizer adds no <|im_start|>"),
        (None, False, "no BOS: the model has none"),
    ],
)
def test_the_words_for_bos(bos: str | None, adds: bool, said: str) -> None:
    assert begins_with(bos, adds) == said
