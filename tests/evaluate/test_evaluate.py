"""`lorafit eval`: the losses of training again, tasks counted right, and lm-evaluation-harness on our engine."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.runs import run_to_export

from lorafit.cli.main import main
from lorafit.errors import DataError, RunError
from lorafit.evaluate.run import evaluate_run
from lorafit.evaluate.tasks import read_tasks, score
from lorafit.export.run import export_run
from lorafit.infer.model import Answer, load
from lorafit.observe.metrics_file import read_metrics


@pytest.fixture(scope="module")
def run(finished_run: Path) -> Path:
    return finished_run


def tasks_file(folder: Path, *lines: object) -> Path:
    path = folder / "tasks.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_losses_are_those_that_training_measured(run: Path, tmp_path: Path) -> None:
    export = export_run(run, "merged", output=tmp_path / "merged", verify=False).path
    base, adapter, merged = evaluate_run(run, exports=[export], offline=True)
    told = [event for event in read_metrics(run / "metrics.jsonl") if event["event"] == "heldout"][-1]
    assert (base.model, adapter.model, merged.model) == ("base", "adapter", str(export))
    assert base.loss == pytest.approx(told["base_loss"], rel=1e-6)
    assert adapter.loss == pytest.approx(told["loss"], rel=1e-6)
    assert merged.loss == pytest.approx(adapter.loss, rel=1e-5)
    assert adapter.loss != pytest.approx(base.loss, rel=1e-2)
    for measured in (base, adapter, merged):
        assert measured.loss is not None
        assert measured.perplexity == pytest.approx(math.exp(measured.loss))
        assert measured.tokens > 0


@pytest.mark.slow
def test_rows_that_changed_since_training_are_refused(tmp_path: Path) -> None:
    run = run_to_export(tmp_path)
    rows = tmp_path / "rows.json"
    rows.write_text(rows.read_text().replace("number", "figure"))
    with pytest.raises(RunError, match="changed since the training"):
        evaluate_run(run, offline=True)


def test_only_a_whole_merged_model_counts_as_export(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a merged model"):
        evaluate_run(run, exports=[run / "adapter"], offline=True)
    export = export_run(run, "merged", output=tmp_path / "merged", verify=False).path
    weights = export / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RunError, match="the export is damaged"):
        evaluate_run(run, exports=[export], offline=True)


def test_tasks_are_right_by_answer_or_pattern(tmp_path: Path) -> None:
    path = tasks_file(
        tmp_path,
        {"prompt": "2 + 3?", "answer": "5"},
        "",
        {"prompt": "A colour?", "answer": ["red", " green "]},
        {"instruction": "When?", "input": "the war", "pattern": r"\b1945\b", "system": "Short."},
        {"question": "Which?", "context": "two towers", "answer": "both"},
    )
    number, colour, year, towers = read_tasks(path)
    assert (towers.prompt.question(), towers.answers) == ("Which?\n\ntwo towers", ("both",))
    assert [number.is_right(said) for said in ("5", " 5\n", "5.", "It is 5")] == [True, True, False, False]
    assert [colour.is_right(said) for said in ("red", "green", "blue")] == [True, True, False]
    assert [year.is_right(said) for said in ("In 1945, I think.", "19456")] == [True, False]
    assert (year.prompt.question(), year.prompt.system) == ("When?\n\nthe war", "Short.")


def test_every_line_that_is_no_task_is_named(tmp_path: Path) -> None:
    wrong: list[tuple[object, str]] = [
        ("{", "is not JSON"),
        ([1], "a task is an object"),
        ({"prompt": "x", "answer": "y", "colour": 1}, "a task has no `colour`"),
        ({"answer": "y"}, "`prompt` is missing"),
        ({"prompt": "x"}, "either `answer` or `pattern`"),
        ({"prompt": "x", "answer": "y", "pattern": "z"}, "either `answer` or `pattern`"),
        ({"prompt": "x", "pattern": "("}, "not a regular expression"),
        ({"prompt": "x", "answer": []}, "`answer` is neither"),
        ({"prompt": "x", "answer": "y", "system": 3}, "`system` is not text"),
    ]
    with pytest.raises(DataError) as caught:
        read_tasks(tasks_file(tmp_path, *(line for line, _ in wrong)))
    places = [problem.place for problem in caught.value.problems]
    assert [problem.message for problem in caught.value.problems if "2 rows: " in problem.message] == [
        "2 rows: a task has either `answer` or `pattern`"
    ]
    lines = [1, 2, 3, 4, 5, 7, 8, 9]  # what is wrong with row 5 is wrong with row 6
    for line, place, problem in zip(lines, places, caught.value.problems, strict=True):
        assert place.endswith("rows 5, 6" if line == 5 else f"line {line}")
        assert wrong[line - 1][1] in problem.message
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(DataError, match="no task in the file"):
        read_tasks(tmp_path / "empty.json")
    with pytest.raises(DataError, match="no such file"):
        read_tasks(tmp_path / "nothing.jsonl")


def test_answers_are_counted(tmp_path: Path) -> None:
    tasks = read_tasks(tasks_file(tmp_path, *({"prompt": f"{n}?", "answer": str(n)} for n in range(4))))
    said = [Answer("0", 1, True), Answer("x", 1, True), Answer(" 2 ", 9, False), Answer("3", 1, True)]
    asked: dict[str, Any] = {}

    def generate(prompts: Any, **settings: Any) -> list[Answer]:
        asked.update(settings, prompts=[prompt.instruction for prompt in prompts])
        return said

    found = score(SimpleNamespace(generate=generate), tasks, max_tokens=7, base=True)  # type: ignore[arg-type]
    assert (found.right, found.ended, found.total) == (3, 3, 4)
    assert asked == {"prompts": ["0?", "1?", "2?", "3?"], "max_tokens": 7, "base": True}


@pytest.fixture
def cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lorafit", *map(str, words)])
        capsys.readouterr()
        try:
            main()
            code: object = 0
        except SystemExit as error:
            code = error.code or 0
        assert isinstance(code, int)
        return code, *capsys.readouterr()

    return call


def test_a_table_before_and_after(
    run: Path, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    live = load(run, device="cpu").generate(["Say 7."], max_tokens=5)[0].text
    path = tasks_file(
        tmp_path, {"prompt": "Say 7.", "answer": live}, {"prompt": "Say 8.", "pattern": "^never$"}
    )
    code, out, err = cli("eval", run, "--tasks", path, "--max-tokens", 5, "--offline")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].split() == ["model", "held-out", "loss", "perplexity", "tasks.jsonl", "ended"]
    assert [line.split()[0] for line in lines[2:4]] == ["base", "adapter"]
    assert "0 of 2" in lines[2]
    assert "1 of 2" in lines[3]
    code, out, err = cli("eval", run, "--tasks", path, "--max-tokens", 5, "--offline", "--json")
    told = [json.loads(line) for line in out.splitlines()]
    assert [line["model"] for line in told] == ["base", "adapter"]
    assert told[1]["tasks"][str(path)]["right"] == 1
    assert f"{told[1]['heldout_loss']:.4f}" in lines[3]
