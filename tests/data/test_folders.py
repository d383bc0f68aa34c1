"""Folders, patterns and addresses: which files hold the rows, and every other data file is named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.data.folders import Wanted, data_files, files_of
from lorafit.data.sources import Reading, find_sources
from lorafit.errors import DataError

ROW = '{"instruction": "a", "output": "b"}\n'


def write(root: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def read(root: Path, wanted: Wanted | None = None) -> list[str]:
    """The files that are read, relative to `root`."""
    return [file.path.relative_to(root).as_posix() for file in files_of(str(root), wanted or Wanted()).files]


def left_out(root: Path) -> dict[str, str]:
    return dict(files_of(str(root), Wanted()).left_out)


def refusal(spec: object, wanted: Wanted | None = None) -> str:
    with pytest.raises(DataError) as caught:
        files_of(str(spec), wanted or Wanted())
    [problem] = caught.value.problems
    return f"{problem.message}: {problem.hint}"


CARD = """---
configs:
- config_name: main
  data_files: [{split: train, path: main/*}, {split: test, path: "main-test/*"}]
- config_name: socratic
  data_files: socratic/*
---
"""


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["train.jsonl", "valid.jsonl", "test.jsonl"], {"train": "train", "validation": "valid", "test": "test"}),
        (["a.jsonl", "b.jsonl"], {"train": "a b"}),
        (["rows.jsonl", "test.jsonl"], {"train": "rows", "test": "test"}),
        (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl"],
         {"train": "data/train-00000-of-00002 data/train-00001-of-00002", "test": "data/test-00000-of-00001"}),
        (["en/train.jsonl", "en/dev.jsonl"], {"train": "en/train", "validation": "en/dev"}),
        (["train/a.jsonl", "test/a.jsonl", "train/b.jsonl"], {"train": "train/a train/b", "test": "test/a"}),
    ],
)  # fmt: skip
def test_splits_of_a_folder(tmp_path: Path, files: list[str], expected: dict[str, str]) -> None:
    write(tmp_path, dict.fromkeys(files, ROW))
    for split, names in expected.items():
        assert read(tmp_path, Wanted(split)) == [f"{name}.jsonl" for name in names.split()]
        assert set(read(tmp_path, Wanted(split))) | {
            name for name, _ in files_of(str(tmp_path), Wanted(split)).left_out
        } == set(files)
    listed = ", ".join(sorted(expected))
    assert refusal(tmp_path, Wanted("extra")).endswith(f"its splits: {listed}; data.split names one")


def test_a_data_set_that_was_saved_to_disk(tmp_path: Path) -> None:
    """Split names are those in dataset_dict.json. What the library computed or wrote beside the rows is no row."""
    table = pyarrow.Table.from_pylist([{"instruction": "a", "output": "b"}])
    for split in ("train_sft", "test_sft"):
        (tmp_path / split).mkdir()
        for name in ("data-00000-of-00001.arrow", "cache-0123.arrow"):
            with pyarrow.ipc.new_stream(str(tmp_path / split / name), table.schema) as sink:
                sink.write_table(table)
        write(tmp_path / split, {"state.json": "{}", "dataset_info.json": "{}"})
    write(tmp_path, {"dataset_dict.json": json.dumps({"splits": ["train_sft", "test_sft"]})})
    assert read(tmp_path, Wanted("train_sft")) == ["train_sft/data-00000-of-00001.arrow"]
    assert "train_sft" in refusal(tmp_path)
    assert read(tmp_path / "test_sft") == ["data-00000-of-00001.arrow"]


def test_a_clone_with_configurations(tmp_path: Path) -> None:
    files = ["main/a.jsonl", "main-test/b.jsonl", "socratic/c.jsonl"]
    write(tmp_path, {**dict.fromkeys(files, ROW), "README.md": CARD})
    assert read(tmp_path, Wanted(config="main")) == ["main/a.jsonl"]
    assert read(tmp_path, Wanted("test", config="main")) == ["main-test/b.jsonl"]
    assert read(tmp_path, Wanted(config="socratic")) == ["socratic/c.jsonl"]
    assert "several configurations and no default one: main, socratic" in refusal(tmp_path)
    assert "data.config=main" in refusal(tmp_path)
    assert "has no configuration `x`; it has main, socratic" in refusal(tmp_path, Wanted(config="x"))
    write(tmp_path, {"README.md": "# no card"})
    assert "names no configurations" in refusal(tmp_path, Wanted(config="x"))


def test_strays_are_named_with_their_reason(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "rows.json": f"[{ROW}]",
            "package.json": '{"name": "x", "keywords": ["y"], "scripts": {"a": "b"}}',
            "notes.txt": "about",
            "README.md": "about",
            "old/more.jsonl": ROW,
            ".hidden.json": "{}",
            "config.json": "{}",
            "script.py": "",
        },
    )
    assert read(tmp_path) == ["rows.json"]
    assert left_out(tmp_path) == {
        "package.json": "holds no rows",
        "notes.txt": "a text beside data files",
        "old/more.jsonl": "in a folder in it",
    }
    assert "package.json (holds no rows)" in find_sources([str(tmp_path)]).left_out


def test_a_file_with_rows_that_fit_no_format_is_an_error_and_no_stray(tmp_path: Path) -> None:
    write(tmp_path, {"a.json": f"[{ROW}]", "b.json": '[{"x": 1}, {"x": 2}]', "c.json": ROW})
    assert read(tmp_path) == ["a.json", "b.json", "c.json"]


def test_documents(tmp_path: Path) -> None:
    """Words in the names of documents are no splits, unless every name has one. A README is not read with others."""
    write(tmp_path, dict.fromkeys(["intro.md", "training.md", "test.txt", "README.md"], "text"))
    assert read(tmp_path) == ["intro.md", "test.txt", "training.md"]
    assert left_out(tmp_path) == {"README.md": "about the others"}
    (tmp_path / "intro.md").unlink()
    assert read(tmp_path) == ["training.md"]
    assert data_files(tmp_path / "README.md") == [tmp_path / "README.md"]


def test_the_split_to_measure_on(tmp_path: Path) -> None:
    write(tmp_path, dict.fromkeys(["train.jsonl", "valid.jsonl", "test.jsonl"], ROW))
    unnamed = Wanted(None, "data.eval_split")
    assert read(tmp_path, unnamed) == ["valid.jsonl"]
    (tmp_path / "valid.jsonl").unlink()
    assert read(tmp_path, unnamed) == ["test.jsonl"]
    (tmp_path / "test.jsonl").unlink()
    assert read(tmp_path, unnamed) == ["train.jsonl"]
    write(tmp_path, {"extra-train.csv": "text\na\n", "data/x.jsonl": ROW})
    assert "data.eval_split names one" in refusal(tmp_path, Wanted("validation", "data.eval_split"))


def test_data_files_of_prompts_have_no_splits(tmp_path: Path) -> None:
    write(tmp_path, dict.fromkeys(["train.jsonl", "test.jsonl", "README.md", "in/x.jsonl"], ROW))
    assert data_files(tmp_path) == [tmp_path / "test.jsonl", tmp_path / "train.jsonl"]
    with pytest.raises(DataError, match="the folder holds no data files"):
        data_files(write(tmp_path / "empty", {"x.py": ""}))


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, dict.fromkeys(["a/b.jsonl", "a/c.jsonl", "a/d.csv", "e/f/g.jsonl", "[x]/y.jsonl"], ROW))
    monkeypatch.chdir(tmp_path)
    for pattern, names in {
        "a/*.jsonl": ["a/b.jsonl", "a/c.jsonl"],
        "**/*.jsonl": ["[x]/y.jsonl", "a/b.jsonl", "a/c.jsonl", "e/f/g.jsonl"],
        "a/[bd].*": ["a/b.jsonl", "a/d.csv"],
        "[x]/y.jsonl": ["[x]/y.jsonl"],  # a path that exists is no pattern
    }.items():
        assert [file.name for file in files_of(pattern, Wanted()).files] == names
    write(tmp_path, dict.fromkeys(["s/train.jsonl", "s/test.jsonl"], ROW))
    found = files_of("s/*.jsonl", Wanted())
    assert ([file.name for file in found.files], found.left_out) == (
        ["s/train.jsonl"],
        [("test.jsonl", "split test")],
    )
    assert "no file fits the pattern" in refusal("a/*.parquet")


@pytest.mark.parametrize(
    ("address", "hint"),
    [
        ("https://example.org/rows.json", "download it first, and give the file"),
        ("http://localhost/x", "download it first"),
        ("s3://bucket/rows.parquet", "download it first"),
        ("hf://datasets/owner/name", "write owner/name"),
        ("hf://datasets/owner/name/data/a.parquet", "write owner/name"),
        ("https://huggingface.co/datasets/owner/name", "write owner/name"),
        ("https://huggingface.co/datasets/owner/name/tree/main", "write owner/name"),
        ("file:///home/me/rows.json", "write the path: /home/me/rows.json"),
    ],
)
def test_addresses(address: str, hint: str) -> None:
    assert hint in refusal(address)


def test_a_name_that_no_system_takes() -> None:
    assert "cannot be read: File name too long" in refusal("a" * 300 + ".json")


def test_a_folder_without_data_says_what_it_has(tmp_path: Path) -> None:
    write(tmp_path, {"README.md": "x", "a.xlsx": "x"})
    assert "the folder holds no data files" in refusal(tmp_path)
    assert ".jsonl" in refusal(tmp_path)


WORDS = st.sampled_from(["train", "valid", "dev", "test", "eval", "rows", "part", "0", "en"])


@given(names=st.sets(st.lists(WORDS, min_size=1, max_size=3).map("-".join), min_size=1, max_size=5))
def test_every_file_is_read_or_named_and_no_test_file_is_trained(
    tmp_path_factory: pytest.TempPathFactory, names: set[str]
) -> None:
    root = write(tmp_path_factory.mktemp("any"), {f"{name}.jsonl": ROW for name in names})
    try:
        found = files_of(str(root), Wanted())
    except DataError as error:
        assert "its splits" in error.problems[0].hint
        return
    chosen = [file.path.stem for file in found.files]
    assert sorted([*chosen, *(name.removesuffix(".jsonl") for name, _ in found.left_out)]) == sorted(names)
    measured = {"valid", "dev", "test", "eval"}
    assert not [name for name in chosen if measured & set(name.split("-")) and "train" not in name.split("-")]


def test_files_to_measure_on_are_not_trained(tmp_path: Path) -> None:
    write(tmp_path, dict.fromkeys(["a.jsonl", "b.jsonl"], ROW))
    held = str(tmp_path / "b.jsonl")
    sources = find_sources([str(tmp_path)], Reading(), Wanted(), [held], Wanted(None))
    assert [(file.path.name, file.heldout) for file in sources.files] == [
        ("a.jsonl", False),
        ("b.jsonl", True),
    ]
    with pytest.raises(DataError, match="none is left to train on"):
        find_sources([str(tmp_path / "a.jsonl"), held], Reading(), Wanted(), [str(tmp_path)], Wanted(None))
