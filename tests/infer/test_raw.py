"""Rows without a template: what is trained as it is, is asked as it is, by every way to ask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.runs import tiny_run
from tests.tiny_models import write_model

from lorafit.api import generate
from lorafit.data.formats import Completion, Instruction, Message, Row, Text
from lorafit.errors import ConfigError, DataError
from lorafit.export.chat_template import chat_template, render
from lorafit.export.ollama import go_template, render_go
from lorafit.infer.conversation import Conversation
from lorafit.infer.model import Model, load
from lorafit.infer.prompts_file import read_prompts
from lorafit.run_dir import RunDirectory

PROMPT = "The cat {{ sat }} on"
RAW: dict[str, list[dict[str, Any]]] = {
    "completion": [{"prompt": f"Word {n}", "completion": f" is {n}."} for n in range(12)],
    "text": [{"text": f"Word {n} is {n}."} for n in range(12)],
}


def run_of(folder: Path, rows: list[dict[str, Any]], *more: str) -> Path:
    folder.mkdir()
    (folder / "rows.json").write_text(json.dumps(rows))
    model = write_model(folder / "model")
    words = [
        f"model.name={model}",
        f"data.path={folder / 'rows.json'}",
        "model.device=cpu",
        "train.max_steps=1",
    ]
    return tiny_run(
        [*words, "run.samples=2", "data.holdout=2", "run.verify=false", *more], folder / "run"
    ).path


@pytest.fixture(scope="module", params=RAW)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("raw") / request.param, RAW[request.param])


@pytest.fixture(scope="module")
def model(trained: Path) -> Model:
    return load(trained, device="cpu")


def test_every_way_to_ask_gives_the_prompt_as_it_is(trained: Path, model: Model, tmp_path: Path) -> None:
    renderer = model.renderer
    assert renderer.contract.template == "raw"
    expected = [256, *renderer.tokenizer.encode(PROMPT)]  # after BOS
    row = Row(0, "", Completion(PROMPT, "x"))
    (outcome,) = renderer.render_batch([row])
    assert outcome.ids[: len(expected)] == expected  # type: ignore[union-attr]
    asked = [PROMPT, Instruction(PROMPT, "", ""), Completion(PROMPT, ""), [Message("user", PROMPT)]]
    for question in [*asked, [{"role": "user", "content": PROMPT}]]:
        assert model.prompt_ids(question) == expected  # type: ignore[arg-type]
    assert model.prompt_ids(Text("anything")) == [256]
    lines = [{"prompt": PROMPT}, {"instruction": PROMPT}, {"messages": [{"role": "user", "content": PROMPT}]}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [row.ids for row in read_prompts(tmp_path / "p.jsonl", model)] == [expected] * 3
    conversation = Conversation(model, 10)
    conversation.answered(conversation.ask("first"), "yes")
    assert model.prompt_ids(conversation.ask(PROMPT).messages) == expected
    assert "no template" in conversation.note


def test_exports_ask_it_as_it_is(model: Model) -> None:
    template = go_template(model.renderer)
    assert render_go(template, [Message("user", PROMPT)]).strip() == PROMPT
    source = chat_template(model.renderer)
    assert render(model.renderer, source, [Message("user", PROMPT)]).removeprefix("<s>") == PROMPT
    for wrong in ([Message("system", "s"), Message("user", "x")], [Message("user", "x")] * 2):
        with pytest.raises(DataError, match="without a template"):
            render(model.renderer, source, wrong)


def test_what_a_raw_prompt_cannot_have_is_refused(trained: Path, model: Model) -> None:
    for turns in (
        [Message("system", "s"), Message("user", "x")],
        [Message("user", "x"), Message("assistant", "y"), Message("user", "z")],
    ):
        with pytest.raises(DataError, match="a prompt is one text"):
            model.prompt_ids(turns)
    with pytest.raises(ConfigError, match="no system prompt"):
        load(trained, device="cpu", system="Be kind.")


def test_the_contract_says_how_a_run_is_asked(tmp_path: Path) -> None:
    """Conversations in `prompt` and `completion` have a template, texts have none; unused settings are named."""
    turns = [{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "Ho"}]
    run = run_of(tmp_path / "chat", [{"prompt": turns[0], "completion": turns[1]}] * 12)
    assert json.loads((run / "prompt.json").read_text())["template"] == "chat"
    run = run_of(tmp_path / "text", RAW["text"], "data.system=s", "data.template=alpaca")
    assert json.loads((run / "prompt.json").read_text())["system"] == ""
    said = (RunDirectory(run).path / "metrics.jsonl").read_text()
    assert "data.system is not used" in said
    assert "data.template=alpaca is not used" in said


def test_one_prompt_is_one_prompt(model: Model) -> None:
    """A text, or a conversation of plain objects, is one; another type is refused, with what is right."""
    one = [answer.text for answer in generate(model, ["Tell me."], max_tokens=4)]
    turn: dict[str, object] = {"role": "user", "content": "Tell me."}
    for prompts in ("Tell me.", Completion("Tell me.", ""), [turn], [[turn]], [Message("user", "Tell me.")]):
        assert [answer.text for answer in generate(model, prompts, max_tokens=4)] == one  # type: ignore[arg-type]
    assert len(generate(model, ["a", "b"], max_tokens=2)) == 2
    assert generate(model, []) == []
    for wrong in (
        3,
        None,
        b"Tell me.",
        [3],
        [turn, "x"],
        {"role": "user", "content": "x"},
        [{"content": "x"}],
    ):
        with pytest.raises(DataError) as caught:
            generate(model, wrong)  # type: ignore[arg-type]
        assert caught.value.problems[0].hint
