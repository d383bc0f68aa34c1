"""Checks of calls, reasoning, weights, keys and rendered texts, from the files of rows to the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.data.test_tools import HERMES
from tests.runs import tiny_run
from tests.tiny_models import write_model

from lorafit.check.run import check_data
from lorafit.config.load import load_config
from lorafit.data.formats import Message
from lorafit.errors import CheckResult, DataError, ModelError
from lorafit.export.chat_template import chat_template, render
from lorafit.infer.model import load

ASK, END = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "It is 5."}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("today") / "model")
    path = folder / "tokenizer_config.json"
    source = HERMES.replace("<|im_start|>", "<").replace("<|im_end|>", "</s>")
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": source}))
    return folder


def results(model: Path, folder: Path, rows: list[dict[str, Any]], *words: str) -> dict[str, CheckResult]:
    (folder / "rows.json").write_text(json.dumps(rows))
    settings = [f"model.name={model}", f"data.path={folder / 'rows.json'}", "data.holdout=0", *words]
    return {result.name: result for result in check_data(load_config(None, settings), quiet=True).verdicts}


def test_thoughts_of_earlier_turns_and_broken_arguments(model: Path, tmp_path: Path) -> None:
    call = {"name": "f", "arguments": "{broken"}
    rows: list[dict[str, Any]] = [
        {"messages": [ASK, {**END, "reasoning": "One."}, ASK, {**END, "reasoning": "Two."}]},
        {"messages": [ASK, {**END, "content": "<think>\nOne.\n</think>\n\nYes."}]},
        {"messages": [ASK, {**END, "reasoning": "One.", "weight": 0}, ASK, {**END, "reasoning": "Two."}]},
        {
            "messages": [
                ASK,
                {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "content": "5"},
                END,
            ]
        },
    ]
    found = results(model, tmp_path, rows)
    message = "the template drops the reasoning of earlier turns: 1 thought is never trained"
    assert (found["reasoning"].verdict, found["reasoning"].message, found["reasoning"].rows) == (
        "warn",
        message,
        (1,),
    )
    assert found["calls"].message == "arguments are not valid JSON in 1 row (f({broken))"
    assert (found["calls"].verdict, found["calls"].rows) == ("warn", (4,))
    assert found["trained text"].verdict == "pass"
    assert found["loss weights"].message == "7 answers = 1 of weight 0 + 6 of weight 1"
    assert found["keys"].message == "keys read: `reasoning` as `reasoning_content` (2 rows)"
    assert not {"reasoning", "calls", "loss weights", "keys"} & set(
        results(model, tmp_path, [{"messages": [ASK, END]}])
    )


def test_arguments_of_the_template_reach_training_answers_and_exports(model: Path, tmp_path: Path) -> None:
    asks = "data.template_args={enable_thinking: false}"
    rows = [{"messages": [ASK, {**END, "reasoning": "One."}]}, {"messages": [ASK, END]}]
    with pytest.raises(DataError, match="asks without a thought"):
        results(model, tmp_path, rows, asks)
    with pytest.raises(ModelError, match="reads no `thinking`"):
        results(model, tmp_path, rows, "data.template_args={thinking: true}")
    (tmp_path / "rows.json").write_text(json.dumps(rows[1:] * 9))
    words = [
        f"model.name={model}",
        f"data.path={tmp_path / 'rows.json'}",
        "train.max_steps=1",
        "run.samples=0",
    ]
    run = tiny_run([*words, "run.verify=false", asks], tmp_path / "run").path
    renderer = load(run, device="cpu").renderer
    asked = renderer.prompt_text([Message("user", "What?")])[1]
    assert asked.endswith("<assistant\n<think>\n\n</think>\n\n")
    exported = render(renderer, chat_template(renderer), [Message("user", "What?")])
    assert exported.removeprefix("<s>") == asked


def test_keys_that_are_not_used_are_named_once(model: Path, tmp_path: Path) -> None:
    rows = [{"messages": [ASK, END], "id": n, **({"source": "web"} if n else {})} for n in range(3)]
    assert results(model, tmp_path, rows)["keys"].message == "keys not used: id (3 rows), source (2 rows)"


@pytest.mark.parametrize("format_name", ["text", "completion"])
def test_rendered_texts_fail_until_their_control_tokens_are_read(
    model: Path, tmp_path: Path, format_name: str
) -> None:
    asked, answer = "<s>[INST] Say it. [/INST]", " Yes.</s>"
    row = {"text": asked + answer} if format_name == "text" else {"prompt": asked, "completion": answer}
    found = results(model, tmp_path, [row, {key: f"plain {value[3:-4]}" for key, value in row.items()}])
    assert (found["control tokens"].verdict, found["control tokens"].rows) == ("fail", (1,))
    assert "data.parse_special=true" in found["control tokens"].hint
    found = results(model, tmp_path, [row], "data.parse_special=true")
    names = ("control tokens", "BOS", "stop token", "trained text")
    assert {name: found[name].verdict for name in names} == dict.fromkeys(names, "pass")


def test_texts_with_other_marks_only_warn(model: Path, tmp_path: Path) -> None:
    found = results(model, tmp_path, [{"text": "<|im_start|>user"}])
    assert found["control tokens"].verdict == "warn"
    found = results(model, tmp_path, [{"messages": [{**ASK, "content": "</s>"}, END]}])
    assert found["control tokens"].verdict == "warn"
