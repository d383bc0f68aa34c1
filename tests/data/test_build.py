"""The material of a run: groups, places, held-out samples and digest, from rows that are not kept in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.tiny_models import CHAT_TEMPLATE, byte_tokenizer, write_model, write_rows

from lorafit.check.preflight import find, row_verdicts
from lorafit.config.load import load_config
from lorafit.data.build import TrainingData, build_data, row_order
from lorafit.data.formats import Instruction
from lorafit.errors import ConfigError, DataError, ModelError
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


@pytest.fixture
def rows_to_measure(tmp_path: Path) -> Path:
    path = tmp_path / "measured.jsonl"
    path.write_text("".join(f'{{"instruction": "measured {n}", "output": "m"}}\n' for n in range(7)))
    return path


def test_own_rows_to_measure_on(model: Path, paths: list[Path], rows_to_measure: Path) -> None:
    """They are measured and not trained, all of them, and no training row is held out. The digest covers them."""
    plain = read(model, paths[:1])
    material = read(model, paths[:1], f"data.eval_path={rows_to_measure}")
    assert (len(material.training), len(material.heldout)) == (15, 7)
    assert material.place(14).endswith("first.json row 15")
    assert [material.index.place(number).rpartition("/")[2] for number in material.heldout.numbers[:2]] == [
        "measured.jsonl row 1, line 1", "measured.jsonl row 2, line 2"]  # fmt: skip
    assert material.ledger.lines()[0] == "rows    22 = 15 trained + 7 held out + 0 dropped"
    assert [row.content.fields()["instruction"] for row in material.samples] == [
        f"measured {n}" for n in range(3)
    ]
    assert material.digest() != plain.digest()
    assert (
        row_order(load_config(None, ["model.name=x", f"data.path={paths[0]}"]), material).rows_per_epoch == 15
    )
    rows_to_measure.write_text('{"instruction": "other", "output": "m"}\n')
    assert read(model, paths[:1], f"data.eval_path={rows_to_measure}").digest() != material.digest()


def test_rows_to_measure_on_as_a_split_of_the_same_folder(model: Path, tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    for name, count in (("train", 12), ("valid", 5), ("test", 3)):
        write_rows(tmp_path / "all" / f"{name}.json", count)
    path = [tmp_path / "all"]
    assert (len(read(model, path).training), len(read(model, path).heldout)) == (11, 1)
    material = read(model, path, "data.eval_split=validation", "data.weights=[2]")
    assert (len(material.training), len(material.heldout)) == (12, 5)
    assert "not read: test.json (split test)" in material.reason
    config = load_config(None, ["model.name=x", f"data.path={path[0]}", "data.weights=[2]"])
    assert row_order(config, material).rows_per_epoch == 24
    material = read(model, path, f"data.eval_path={tmp_path / 'all' / 'test.json'}")
    assert (len(material.training), len(material.heldout)) == (12, 3)


def test_rows_to_measure_on_that_cannot_be_used(
    model: Path, paths: list[Path], rows_to_measure: Path
) -> None:
    rows_to_measure.write_text('{"instruction": "a", "output": null}\n')
    with pytest.raises(DataError, match="no row is left to measure on"):
        read(
            model, paths[:1], f"data.eval_path={rows_to_measure}", "data.bad_rows=drop", "data.format=alpaca"
        )


def test_one_path_for_both_is_refused(model: Path, paths: list[Path]) -> None:
    with pytest.raises(ConfigError, match=r"`data.path` and `data.eval_path` both name"):
        read(model, paths[:1], f"data.eval_path={paths[0]}")
    with pytest.raises(DataError, match="none is left to train on"):
        read(model, paths[:1], "data.eval_split=train")


def test_rows_that_are_left_out_are_counted_with_their_reason(model: Path, tmp_path: Path) -> None:
    rows = [{"instruction": f"row {n}", "output": None if n in (3, 5) else "yes"} for n in range(30)]
    rows[8] = {"instruction": "row 8"}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "nope\n")
    with pytest.raises(DataError, match=r"data\.bad_rows=drop"):
        read(model, [path])
    material = read(model, [path], "data.bad_rows=drop")
    assert {reason: numbers.tolist() for reason, numbers in material.encoded.dropped.items()} == {
        "`output` is null": [3, 5],
        "`output` is missing": [8],
        "is not JSON: Expecting value (column 1)": [30],
    }
    assert material.ledger.lines()[:2] == [
        "rows    31 = 25 trained + 2 held out + 4 dropped",
        "        2 dropped: `output` is null",
    ]
    assert read(model, [path], "data.bad_rows=drop").digest() == material.digest()
    assert material.index.place(6).endswith("row 7, line 7")


def test_long_texts_are_split_and_each_token_is_trained_once(model: Path, tmp_path: Path) -> None:
    words = [f"word{n}" for n in range(30)]
    (tmp_path / "book.txt").write_text(" ".join(words))
    for number in range(20):
        (tmp_path / f"short{number}.txt").write_text("A short text.")
    with pytest.raises(DataError, match="data.too_long=split makes several rows"):
        read(model, [tmp_path], "data.max_length=64")
    material = read(model, [tmp_path], "data.max_length=64", "data.too_long=split", "data.holdout=2")
    whole = read(model, [tmp_path], "data.holdout=2")
    assert material.encoded.lengths.max() == 64
    assert material.encoded.targets.sum() == whole.encoded.targets.sum()
    assert set(material.heldout.numbers) == set(whole.heldout.numbers)  # a text is held out as a whole
    assert not set(material.heldout.numbers) & set(material.training.numbers)
    assert material.ledger.num_rows == 21
    assert material.ledger.lines()[1].startswith("        longer texts are split into ")
    verdicts = row_verdicts(find(material, None, quiet=True), material.index, material)
    assert {verdict.name for verdict in verdicts if verdict.verdict != "pass"} <= {"duplicates", "leaks"}
