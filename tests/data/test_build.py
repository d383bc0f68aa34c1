"""The material of a run: groups, places, held-out samples and digest, from rows that are not kept in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.tiny_models import CHAT_TEMPLATE, byte_tokenizer, write_model, write_rows

from lorafit.config.load import load_config
from lorafit.data.build import TrainingData, build_data
from lorafit.data.formats import Instruction
from lorafit.errors import DataError, ModelError
from lorafit.hub.client import model_folder
from lorafit.model.architecture import read_architecture


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("material") / "model")


def read(model: Path, paths: list[Path], *overrides: str) -> TrainingData:
    words = [
        f"model.name={model}",
        f"data.path={[str(path) for path in paths]}",
        "data.holdout=4",
        *overrides,
    ]
    config = load_config(None, words)
    return build_data(config, model_folder(str(model)), read_architecture(model), quiet=True)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """A file, and a folder with two kinds of file."""
    (tmp_path / "folder").mkdir()
    lines = [f'{{"text": "line {number}"}}\n\n' for number in range(20)]
    (tmp_path / "folder" / "a.jsonl").write_text("".join(lines))
    write_rows(tmp_path / "folder" / "b.json", 10)
    return [write_rows(tmp_path / "first.json", 15), tmp_path / "folder"]


def test_groups_and_places(model: Path, paths: list[Path]) -> None:
    material = read(model, paths)
    first, second = material.index.groups(material.training.numbers)
    numbers = material.training.numbers
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(41))
    assert set(numbers[first]) == set(range(15)) - set(material.heldout.numbers.tolist())
    for index in second.tolist():
        number = int(numbers[index]) - 15
        where = (
            f"a.jsonl row {number + 1}, line {2 * number + 1}" if number < 20 else f"b.json row {number - 19}"
        )
        assert material.place(index).endswith(where)
    assert material.format == "alpaca+text"
    assert "b.json: every row has" in material.reason


def test_samples_are_the_first_held_out_rows_with_a_question(model: Path, paths: list[Path]) -> None:
    material = read(model, paths, "data.holdout=0.1", "train.seed=3", "run.samples=50")
    held = [number for number in material.heldout.numbers.tolist() if not 15 <= number < 35]
    assert [row.number for row in material.samples] == held
    assert all(isinstance(row.content, Instruction) for row in material.samples)
    assert len(read(model, paths, "run.samples=0").samples) == 0


def test_the_digest_is_that_of_what_training_sees(model: Path, paths: list[Path]) -> None:
    digest = read(model, paths).digest()
    rows = json.loads(paths[0].read_text())
    paths[0].write_text(json.dumps(rows))  # other bytes, the same rows
    assert read(model, paths).digest() == digest
    assert read(model, paths, "train.seed=7").digest() != digest
    assert read(model, paths, "data.train_on=all").digest() != digest
    rows[2]["output"] += "!"
    paths[0].write_text(json.dumps(rows))
    assert read(model, paths).digest() != digest


def test_all_that_is_wrong_is_reported_and_a_bad_cache_is_a_warning(
    model: Path, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths[0].write_text('[{"instruction": "a"}]')
    with pytest.raises(DataError) as caught:
        read(model, [*paths, tmp_path / "nowhere.json"], "data.format=alpaca")
    places = [problem.place for problem in caught.value.problems]
    assert "first.json row 1, field `output`" in places[0]
    assert [place.rpartition("/")[2] for place in places[1:-1]] == [
        "a.jsonl rows 1, 2, 3, 4, 5 and 15 more"] * 2  # fmt: skip
    assert "nowhere.json" in places[-1]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "file"))
    assert "not cached" in read(model, paths[1:]).warnings[0]


def test_split_and_revision_reach_the_hub(
    model: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def dataset_files(name: str, **options: object) -> object:
        asked.append(options)
        return SimpleNamespace(paths=[paths[0]], revision="abc123")

    monkeypatch.setattr("lorafit.hub.client.dataset_files", dataset_files)
    read(model, [Path("owner/rows")], "data.split=validation", "data.revision=v2", "run.offline=true")
    assert asked == [{"revision": "v2", "split": "validation", "config": None, "offline": True}]


def test_a_row_with_a_token_that_has_no_embedding_is_refused(model: Path, tmp_path: Path) -> None:
    """The tokenizer was given a token: rows without it train, those with it are named."""
    added = shutil.copytree(model, tmp_path / "added")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<|pad|>"])
    tokenizer.save(str(added / "tokenizer.json"))
    assert len(read(added, [write_rows(tmp_path / "rows.json", 20)]).training) == 18
    config = json.loads((added / "tokenizer_config.json").read_text())
    config["chat_template"] = CHAT_TEMPLATE.replace("eos_token", "'<|pad|>'")
    (added / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelError, match=r"token `<\|pad\|>` of row 1 has id 260, but the model has 260 embeddings"
    ):
        read(added, [tmp_path / "rows.json"])
