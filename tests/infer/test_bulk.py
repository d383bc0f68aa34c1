"""Answers to the questions of a file: the same as one by one, in order, and gone on with where they were stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import random_network, write_adapter, write_model

from lorafit.data.formats import Message
from lorafit.errors import ConfigError, DataError
from lorafit.infer.bulk import AnswerFile, answers, line_of, purpose_of
from lorafit.infer.model import Model, load
from lorafit.infer.prompts_file import read_prompts
from lorafit.infer.sampling import Sampling
from lorafit.model.lora import LoraSpec

ROWS: list[Any] = [
    "What is a llama?",
    {"prompt": "Say 7.", "id": 17, "answer": "seven"},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "라마?"}]},
    {"instruction": "Add.", "input": "1 and 2"},
    {"Question": "Which?", "context": "Two towers.", "answer": "both"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    home = tmp_path_factory.mktemp("files")
    base = write_model(home / "model")
    spec = LoraSpec(4, 8.0, 0.0, ("all-linear",), False)
    adapter = write_adapter(home / "adapter", random_network(), spec, base=str(base))
    return load(base, adapter=adapter, device="cpu", dtype="float32")


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_rows_of_every_kind_are_asked_as_one_by_one(model: Model, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_text(
        json.dumps(ROWS) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in ROWS)
    )
    asked = read_prompts(path, model)
    assert [one.raw for one in asked] == ROWS
    from lorafit.data.formats import Instruction

    forms: list[Any] = [
        "What is a llama?",
        "Say 7.",
        [Message("system", "Be brief."), Message("user", "라마?")],
        Instruction("Add.", "1 and 2", "", ""),
        Instruction("Which?", "Two towers.", "", ""),
    ]
    for base in (False, True):
        alone = [model.generate([form], max_tokens=9, base=base)[0] for form in forms]
        assert list(answers(model, asked, max_tokens=9, sampling=Sampling(), base=base)) == alone


def test_a_text_has_a_prompt_a_line(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfOne.\r\n\n  \nTwo.")
    assert [one.raw for one in read_prompts(path, model)] == ["One.", "Two."]


def test_many_come_in_order_whenever_they_end(model: Model, tmp_path: Path) -> None:
    rows = [f"Say {number}{' please' * (number % 5)}." for number in range(40)]
    asked = read_prompts(written(tmp_path / "rows.jsonl", rows), model)
    seen: list[int] = []
    sampling = Sampling(1.3, seed=5)
    made = list(
        answers(model, asked, max_tokens=12, sampling=sampling, advance=lambda done, _: seen.append(done))
    )
    assert seen == sorted(seen)
    assert seen[-1] == 40
    assert made[:16] == model.generate(rows[:16], max_tokens=12, sampling=sampling)
    assert len({answer.text for answer in made}) == 40
    assert list(answers(model, asked, max_tokens=12, sampling=sampling, start=23)) == made[23:]


def test_everything_that_cannot_be_asked_is_said_at_once(model: Model, tmp_path: Path) -> None:
    rows: list[Any] = [
        3,
        {"text": "x"},
        {"prompt": "a", "instruction": "b"},
        {"prompt": 3},
        {"messages": []},
        {"messages": [{"role": "critic", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
        {"prompt": "\ud800"},
        {"prompt": "x" * 300},
        {"prompt": "fine"},
    ]
    with pytest.raises(DataError) as refused:
        read_prompts(written(tmp_path / "rows.jsonl", rows), model)
    assert len(refused.value.problems) == 9
    assert [f"row {number}" in problem.place for number, problem in enumerate(refused.value.problems, 1)] == [
        True
    ] * 9
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="there is no prompt"):
        read_prompts(tmp_path / "empty.txt", model)


def test_what_was_answered_is_not_answered_again(model: Model, tmp_path: Path) -> None:
    asked = read_prompts(written(tmp_path / "rows.jsonl", ROWS), model)
    made = list(answers(model, asked, max_tokens=5, sampling=Sampling()))
    lines = [line_of(index, one, answer) for index, (one, answer) in enumerate(zip(asked, made, strict=True))]
    path = tmp_path / "answers.jsonl"
    first = AnswerFile(path, "this")
    for line in lines[:3]:
        first.add(line)
    first.close()  # as a process that is killed leaves it, and a torn line
    with first.part.open("ab") as part:
        part.write(b'{"index": 3, "inp')
    assert not path.exists()
    with pytest.raises(ConfigError, match="answers to other prompts"):
        AnswerFile(path, "that")
    again = AnswerFile(path, "this")
    assert again.lines == lines[:3]
    for line in lines[3:]:
        again.add(line)
    again.finish()
    assert path.read_text().splitlines() == lines
    assert [json.loads(line)["input"] for line in lines] == ROWS
    assert list(tmp_path.glob("*.part")) == []
    with pytest.raises(ConfigError, match="exists already"):
        AnswerFile(path, "this")


def test_a_file_named_json_is_one_list(tmp_path: Path) -> None:
    path = tmp_path / "answers.json"
    kept = AnswerFile(path, "p")
    lines = [json.dumps({"index": index, "answer": "\n"}) for index in range(3)]
    kept.add(lines[0])
    kept.close()
    again = AnswerFile(path, "p")  # the part has lines
    for line in lines[1:]:
        again.add(line)
    again.finish()
    assert json.loads(path.read_text()) == [json.loads(line) for line in lines]


def test_one_fault_of_many_rows_is_one_problem(model: Model, tmp_path: Path) -> None:
    rows = [{"x": 1}] * 7 + [{"prompt": "a", "messages": []}] + ["fine"]
    with pytest.raises(DataError) as refused:
        read_prompts(written(tmp_path / "rows.jsonl", rows), model)
    many, one = refused.value.problems
    assert many.message.startswith("7 rows: the row must have one of")
    assert many.place == "rows.jsonl rows 1, 2, 3, 4, 5 and 2 more"
    assert one.place.startswith("rows.jsonl row 8")


def test_a_line_out_of_turn_ends_what_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    lines = ['{"index": 0}', '{"index": 2}', '{"index": 1}']
    (tmp_path / "answers.jsonl.part").write_text("\n".join(['{"answers": "p"}', *lines]) + "\n")
    kept = AnswerFile(path, "p")
    assert kept.lines == lines[:1]
    kept.close()


def test_the_purpose_is_all_that_decides_the_answers(model: Model, tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", ROWS)
    first = purpose_of(path, model, 5, Sampling(), False)
    assert purpose_of(path, model, 5, Sampling(), False) == first
    others = [
        purpose_of(path, model, 6, Sampling(), False),
        purpose_of(path, model, 5, Sampling(seed=1), False),
        purpose_of(path, model, 5, Sampling(), True),
        purpose_of(written(tmp_path / "other.jsonl", ROWS[:3]), model, 5, Sampling(), False),
    ]
    with torch.no_grad():
        layer = model.network.model.layers[0].self_attn.q_proj.lora_B
        layer[0, 0] += 1
        others.append(purpose_of(path, model, 5, Sampling(), False))
        layer[0, 0] -= 1
    assert len({first, *others}) == 6


@pytest.mark.parametrize("name", ["question.txt", "question.jsonl"])
def test_a_missing_file_of_prompts_names_the_near_one(model: Model, tmp_path: Path, name: str) -> None:
    written(tmp_path / "questions.jsonl", ROWS)
    with pytest.raises(DataError, match=r"no such file[\s\S]*did you mean \S*questions\.jsonl\?"):
        read_prompts(tmp_path / name, model)
