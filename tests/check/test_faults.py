"""Planted faults of data and of configuration: each is named with its row or key, and clean rows raise nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_models import CHAT_TEMPLATE, write_model

from lorafit.check.run import check_data, check_run
from lorafit.check.verdict import CheckResult, of_error
from lorafit.config.load import load_config
from lorafit.errors import LorafitError

AT = 22  # the row with the fault, from 1
NUM_ROWS = 60
RowData = dict[str, Any]

WORDS = ["goat", "river", "copper", "lantern", "seven", "meadow", "whisper", "hollow", "engine", "button", "candle",
         "walnut", "harbour", "velvet", "thunder", "pepper", "anchor", "marble", "feather", "compass", "orchard",
         "saddle", "mirror", "kettle", "pigeon"]  # fmt: skip


def clean_rows() -> list[RowData]:
    """Rows of which no two share a word triple."""
    rows = []
    for index in range(NUM_ROWS):
        a, b, c = (WORDS[(index * step + index // 25) % 25] for step in (1, 7, 11))
        rows.append({"instruction": f"Use {a} {index}, {b}.", "output": f"Here {c} has {b}, {index} of {a}."})
    return rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("faults") / "model", max_position_embeddings=1024)


def found(
    model: Path, folder: Path, rows: list[RowData], *settings: str, probe: bool = False
) -> list[CheckResult]:
    """All verdicts that do not pass."""
    data = folder / "rows.json"
    data.write_text(json.dumps(rows), encoding="utf-8")
    words = [f"model.name={model}", f"data.path={data}", "model.device=cpu", "model.dtype=float32"]
    try:
        config = load_config(None, [*words, "data.holdout=5", "train.batch_size=6", *settings])
        checked = (check_run if probe else check_data)(config, quiet=True)
    except LorafitError as error:
        return of_error(error)
    assert len(checked.verdicts) > 15 or any(verdict.verdict == "fail" for verdict in checked.verdicts)
    return [verdict for verdict in checked.verdicts if verdict.verdict != "pass"]


def test_clean_rows_raise_nothing(model: Path, tmp_path: Path) -> None:
    assert found(model, tmp_path, clean_rows()) == []


def answer(text: str) -> Callable[[list[RowData]], None]:
    """A fault: another answer in the row."""

    def plant(rows: list[RowData]) -> None:
        rows[AT - 1]["output"] = text

    return plant


def drop(field: str) -> Callable[[list[RowData]], None]:
    return lambda rows: rows[AT - 1].pop(field)


def repeat(rows: list[RowData]) -> None:
    rows[AT - 1] = {key: value.upper() for key, value in rows[3].items()}


def nearly_repeat(rows: list[RowData]) -> None:
    rows[3]["output"] = " ".join(
        WORDS[::step][i] for step in (1, 2, 3, 4, -1, -2, -3) for i in range(len(WORDS[::step]))
    )
    rows[AT - 1] = {**rows[3], "output": f"{rows[3]['output']}s"}


# name of the fault: what is done to the rows, the check that names it, the verdict, a word of what it says
DATA_FAULTS: dict[str, tuple[Callable[[list[RowData]], object], str, str, str]] = {
    "no answer field": (drop("output"), "rows", "fail", "`output` is missing"),
    "true for an answer": (lambda rows: rows[AT - 1].update(output=True), "rows", "fail", "not text"),
    "a lone surrogate": (answer("a \ud83d b"), "rows", "fail", "lone surrogate U+D83D"),
    "an empty answer": (answer("  "), "dropped rows", "warn", "the answer is empty"),
    "an answer that says nothing": (answer("N/A"), "answers", "warn", "next to nothing (N/A)"),
    "a row twice": (repeat, "duplicates", "warn", "word for word"),
    "a row nearly twice": (nearly_repeat, "duplicates", "warn", "nearly like an earlier one"),
    "the wrong encoding": (answer("It isn\u00e2\u20ac\u2122t caf\u00c3\u00a9."), "encoding", "warn", "wrong"),
    "a replacement character": (answer("caf\ufffd au lait"), "encoding", "warn", "replacement"),
    "a byte order mark inside": (answer("Well \ufeffthen."), "encoding", "warn", "byte order"),
    "a control character": (answer("red \x1b[31m text"), "encoding", "warn", "U+001B"),
    "a control token as text": (answer("That is all.</s>"), "control tokens", "warn", "</s>"),
    "a template around a row": (answer("### Response:\nYes, so it is."), "control tokens", "warn", "### Response:"),
    "a row too long": (answer("so it goes on " * 90), "rows", "fail", "the model reads at most 1,024"),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA_FAULTS)
def test_a_fault_of_data_is_named_with_its_row(name: str, model: Path, tmp_path: Path) -> None:
    plant, check, outcome, says = DATA_FAULTS[name]
    rows = clean_rows()
    plant(rows)
    verdicts = found(model, tmp_path, rows)
    named = [verdict for verdict in verdicts if (verdict.name, verdict.verdict) == (check, outcome)]
    assert len(named) == 1, verdicts
    assert says in named[0].message
    assert named[0].hint
    assert f"rows.json row {AT}" in named[0].place
    assert {verdict.name for verdict in verdicts} <= {check, "answers"}


def test_the_row_that_is_too_long_is_named(model: Path, tmp_path: Path) -> None:
    rows = clean_rows()
    rows[AT - 1]["output"] = "so it goes on " * 30
    verdicts = found(model, tmp_path, rows, "data.max_length=200")
    assert f"rows.json row {AT}" in verdicts[0].place
    assert "data.max_length=200" in verdicts[0].message
    cut = found(model, tmp_path, rows, "data.max_length=200", "data.too_long=truncate")
    assert [(verdict.name, verdict.rows) for verdict in cut] == [("lengths", (AT,))]


def test_a_leak_is_named_with_the_held_out_row(model: Path, tmp_path: Path) -> None:
    rows = clean_rows()
    verdicts = found(model, tmp_path, rows * 2)
    (leaks,) = [verdict for verdict in verdicts if verdict.name == "leaks"]
    assert leaks.message.startswith("5 of 5 held-out rows")
    assert len(leaks.rows) == 5
    (repeats,) = [verdict for verdict in verdicts if verdict.name == "duplicates"]
    assert repeats.rows == tuple(range(NUM_ROWS + 1, 2 * NUM_ROWS + 1))


# name of the fault: the settings, the key that is named, the verdict, a word of what it says
CONFIG_FAULTS: dict[str, tuple[list[str], str, str, str]] = {
    "unknown key": (["lora.rnak=8"], "lora.rnak", "fail", "unknown key"),
    "no batch": (["train.batch_size=0"], "train.batch_size", "fail", "greater than or equal to 1"),
    "unknown template": (["data.template=fancy"], "data.template", "fail", "unknown template"),
    "no stop token": (["data.template=classic", "data.eos=false"], "data.eos", "warn", "not learn to stop"),
    "rate too high": (["train.learning_rate=0.5"], "train.learning_rate", "warn", "highest rate known to work"),
    "rate too low": (["train.learning_rate=1e-8"], "train.learning_rate", "warn", "so small"),
    "warm-up without end": (["train.warmup=500"], "train.warmup", "warn", "late or never"),
    "ends before all rows": (["train.max_steps=20", "train.batch_size=2"], "train.max_steps", "warn", "never trained"),
    "too few steps": (["train.max_steps=2"], "train.epochs", "warn", "too few steps"),
    "the adapter drowns the base": (["lora.alpha=4000"], "lora.alpha", "warn", "can overwhelm"),
    "nothing to hold out": (["data.holdout=0.001"], "data.holdout", "warn", "not measured"),
    "patience for nothing": (["data.holdout=0", "train.patience=2"], "train.patience", "fail", "no row is held out"),
    "too many epochs": (["train.epochs=100"], "train.epochs", "warn", "overfit"),
    "two weights for one path": (["data.weights=[1,2]"], "", "fail", "`data.weights` has 2 numbers"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIG_FAULTS)
def test_a_fault_of_configuration_is_named_with_its_key(name: str, model: Path, tmp_path: Path) -> None:
    settings, key, outcome, says = CONFIG_FAULTS[name]
    verdicts = found(model, tmp_path, clean_rows(), *settings)
    assert [verdict.verdict for verdict in verdicts] == [outcome], verdicts
    assert key in verdicts[0].text
    assert says in verdicts[0].message
    assert verdicts[0].hint


MODEL_FAULTS: dict[str, tuple[list[str], str, str, str, str]] = {
    "no such target": (["lora.targets=[q_porj]"], "lora.targets", "settings", "fail", "matches no linear"),
    "no such device": (["model.device=cuda:77"], "cuda:77", "settings", "fail", "cuda:77"),
    "uphill": (["train.learning_rate=0.9"], "train.learning_rate", "trial step", "warn", "too high"),
}


@pytest.mark.parametrize("name", MODEL_FAULTS)
def test_a_fault_that_only_the_model_shows(name: str, model: Path, tmp_path: Path) -> None:
    settings, key, check, outcome, says = MODEL_FAULTS[name]
    verdicts = found(model, tmp_path, clean_rows(), *settings, probe=True)
    named = [verdict for verdict in verdicts if verdict.name == check]
    assert [verdict.verdict for verdict in named] == [outcome], verdicts
    assert key in named[0].text
    assert says in named[0].message


def with_template(model: Path, folder: Path, template: str) -> Path:
    """The model with another chat template."""
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    return folder


def test_a_template_that_begins_twice_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "twice").mkdir()
    doubled = with_template(model, tmp_path / "twice", "{{ bos_token + bos_token }}" + CHAT_TEMPLATE)
    (verdict,) = found(doubled, tmp_path, clean_rows())
    assert (verdict.name, verdict.verdict) == ("BOS", "fail")
    assert "begin with it twice (<s>)" in verdict.message
    assert verdict.rows == tuple(range(1, NUM_ROWS + 1))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    small = write_model(tmp_path / "model", vocab_size=200)
    (verdict,) = found(small, tmp_path, clean_rows())
    assert (verdict.name, verdict.verdict) == ("model", "fail")
    assert "row 1" in verdict.message
    assert "the model has 200 embeddings" in verdict.message


def test_there_are_more_than_ten_faults_of_each_kind() -> None:
    assert len(DATA_FAULTS) >= 10
    assert len(CONFIG_FAULTS) + len(MODEL_FAULTS) >= 10
