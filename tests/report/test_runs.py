"""Real runs leave a report when they finish and when they are interrupted; one that cannot be written stops nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.runs import events, interrupt_after, tiny_run

from lorafit.report.page import page
from lorafit.report.run_data import read_facts
from lorafit.run_dir import RunDirectory
from lorafit.training import setup
from lorafit.training.run import resume_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def material(tiny: list[str]) -> list[str]:
    return [*tiny, "train.max_steps=4", "train.save_every=2", "run.samples=1"]


def test_an_interrupted_run_has_a_report_and_the_finished_one_another(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        stopped = tiny_run(material, tmp_path / "run", "run.samples_every=1")
    text = (stopped.path / "report.html").read_text()
    assert 'badge interrupted">interrupted' in text
    assert '<section id="answers">' in text
    finished = resume_run(stopped.path, quiet=True)
    text = (finished.path / "report.html").read_text()
    assert 'badge finished">finished' in text
    assert "Say the number" in text
    assert page(read_facts(RunDirectory.open(finished.path))) == text
    assert events(finished, "note")[-1]["text"] == f"report {finished.path / 'report.html'}"


def test_rows_are_shown_as_they_are_trained(material: list[str], tmp_path: Path) -> None:
    result = tiny_run(material, tmp_path / "run")
    stored = json.loads((result.path / "rows.json").read_text())
    ledger = json.loads((result.path / "ledger.json").read_text())
    lengths = stored["lengths"]
    assert sum(lengths["training"]) == ledger["trained"]["rows"]
    assert sum(lengths["heldout"]) == ledger["held_out"]["rows"]
    assert lengths["edges"][-1] > ledger["lengths"]["max"] >= lengths["edges"][-3]
    row = stored["rows"][0]
    assert row["place"].endswith(" row 1")
    text = "".join(span for span, _ in row["spans"])
    assert text.startswith("<s><|user|>\nSay the number 0.")
    trained = "".join(span for span, is_trained in row["spans"] if is_trained)
    assert trained == "It is number 0.</s>"
    assert row["tokens"] > row["trained"] > 0
    longest = max(stored["rows"], key=lambda row: row["tokens"])
    assert longest["tokens"] == ledger["lengths"]["max"]


def test_a_report_that_cannot_be_written_is_a_warning(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_the_way(*_: object) -> dict[str, object]:
        (tmp_path / "run" / "report.html").mkdir()
        return {}

    monkeypatch.setattr(setup, "excerpt", in_the_way)
    result = tiny_run(material, tmp_path / "run")
    assert result.finished
    warnings = [event["text"] for event in events(result, "note") if event["level"] == "warning"]
    assert [text for text in warnings if text.startswith("no report: cannot write `report.html`")]
