"""Held-out prompts answered while training: they are recorded, and training goes on to the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.runs import digest, events, interrupt_after, tiny_run

from lorafit.errors import DataError
from lorafit.infer.model import Model
from lorafit.training.run import resume_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def material(tiny: list[str]) -> list[str]:
    return [*tiny, "lora.dropout=0.1", "train.max_steps=8", "train.save_every=2", "run.samples=2"]


def test_answers_are_recorded_and_change_nothing(material: list[str], tmp_path: Path) -> None:
    silent = tiny_run(material, tmp_path / "silent")
    spoken = tiny_run(material, tmp_path / "spoken", "run.samples_every=3")
    assert digest(silent) == digest(spoken)
    assert events(silent, "answers") == []
    found = events(spoken, "answers")
    assert [event["step"] for event in found] == [3, 6]
    samples = json.loads((spoken.path / "samples.json").read_text())
    assert found[0]["prompts"] == [sample["prompt"] for sample in samples]
    assert found[0]["base"] == [sample["base"]["text"] for sample in samples]
    assert found[1]["base"] is None
    assert found[0]["tuned"] != found[1]["tuned"]
    assert samples == json.loads((silent.path / "samples.json").read_text())


def test_a_resumed_run_answers_at_the_same_steps_and_ends_in_the_same_bytes(
    material: list[str], tmp_path: Path
) -> None:
    whole = tiny_run(material, tmp_path / "whole", "run.samples_every=3")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(4, patch)
        stopped = tiny_run(material, tmp_path / "stopped", "run.samples_every=3")
    assert not stopped.finished
    resumed = resume_run(stopped.path, quiet=True)
    assert digest(resumed) == digest(whole)
    assert [(event["step"], event["tuned"]) for event in events(resumed, "answers")] == [
        (event["step"], event["tuned"]) for event in events(whole, "answers")
    ]


def test_epoch_is_a_pace_and_the_end_is_left_to_the_samples(material: list[str], tmp_path: Path) -> None:
    result = tiny_run(material, tmp_path / "run", "run.samples_every=epoch", "train.max_steps=12")
    assert [event["step"] for event in events(result, "answers")] == [6]


def test_short_memory_is_said_once_and_the_run_goes_on(
    material: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = Model.generate
    calls = []

    def short(self: Model, *arguments: Any, **settings: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError
        return generate(self, *arguments, **settings)

    monkeypatch.setattr(Model, "generate", short)
    result = tiny_run(material, tmp_path / "run", "run.samples_every=2")
    assert result.finished
    assert events(result, "answers") == []
    notes = [event["text"] for event in events(result, "note") if event["level"] == "warning"]
    assert [note for note in notes if "no memory" in note] == ["no memory to answer prompts: not tried again"]


def test_own_prompts_are_answered_beside_those_of_rows(material: list[str], tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    asked = [{"prompt": "What is new?"}, {"instruction": "Count", "input": "to two"}]
    turns = [{"role": "user", "content": "Hi"}]
    own.write_text("\n".join(json.dumps(row) for row in [*asked, {"messages": turns}]) + "\n")
    silent = tiny_run(material, tmp_path / "silent")
    result = tiny_run(material, tmp_path / "run", f"run.prompts={own}", "run.samples_every=4")
    assert digest(result) == digest(silent)
    samples = json.loads((result.path / "samples.json").read_text())
    texts = ["What is new?", "Count\n\nto two", "Hi"]
    assert [sample["prompt"] for sample in samples[:3]] == texts
    assert samples[3:] == json.loads((silent.path / "samples.json").read_text())
    (answers,) = events(result, "answers")
    assert answers["prompts"][:3] == texts
    assert all(isinstance(sample[name]["text"], str) for sample in samples for name in ("base", "tuned"))


def test_prompts_that_cannot_be_read_end_the_run_before_it_starts(
    material: list[str], tmp_path: Path
) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text('{"what": "?"}\n{"prompt": 3}\n')
    with pytest.raises(DataError) as error:
        tiny_run(material, tmp_path / "run", f"run.prompts={own}")
    assert len(error.value.problems) == 2
    assert not (tmp_path / "run").exists()


def test_without_held_out_rows_trained_ones_are_asked_and_named_so(
    material: list[str], tmp_path: Path
) -> None:
    result = tiny_run(material, tmp_path / "run", "data.holdout=0")
    samples = json.loads((result.path / "samples.json").read_text())
    assert [sample["trained"] for sample in samples] == [True, True]
    assert any("of trained rows" in event["text"] for event in events(result, "note"))
