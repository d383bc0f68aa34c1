"""Parts of a split: the rows that the `datasets` library gives for the same words, from any number of files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.command import Cli

from lorafit.data.folders import SourceFile, Wanted
from lorafit.data.row_index import RowIndex
from lorafit.data.sources import Reading, Sources, find_sources
from lorafit.data.split_parts import cut, split_and_part, without
from lorafit.errors import DataError

BOUND = st.none() | st.integers(-120, 120)


def row(number: int) -> dict[str, str]:
    return {"instruction": f"Say {number}.", "output": f"{number}"}


def write(folder: Path, *counts: int) -> Path:
    """A folder whose files have so many rows, numbered from 0 over all files."""
    folder.mkdir()
    start = 0
    for index, count in enumerate(counts):
        rows = [json.dumps(row(number)) for number in range(start, start + count)]
        (folder / f"train-{index}.jsonl").write_text("\n".join(rows))
        start += count
    return folder


def answers(sources: Sources, heldout: bool | None = None) -> list[int]:
    """The answers of all rows, or of those that are (not) held out."""
    reader = sources.reader()
    rows = [row for chunk in reader.chunks() for row in chunk.rows]
    held = set(reader.heldout())
    assert [row.number for row in rows] == list(range(len(rows)))
    return [int(row.content.output) for row in rows if heldout in (None, row.number in held)]


@pytest.mark.parametrize(
    ("text", "rows", "bounds"),
    [
        ("train[:10]", 100, (0, 10)),
        ("train[10%:20%]", 45, (4, 9)),
        ("train[10:20%]", 100, (10, 20)),
        ("train[-10%:]", 45, (41, 45)),
        ("train[-1_000:]", 100, (0, 100)),
        ("train[:]", 7, (0, 7)),
        ("train[5:200]", 7, (5, 7)),
    ],
)
def test_bounds(text: str, rows: int, bounds: tuple[int, int]) -> None:
    name, part = split_and_part(text, "data.split")
    assert part is not None
    assert (name, part.bounds(rows)) == ("train", bounds)


@pytest.mark.slow  # it imports datasets
@given(BOUND, BOUND, st.booleans(), st.integers(1, 300))
def test_bounds_are_those_of_datasets(first: int | None, stop: int | None, percent: bool, rows: int) -> None:
    arrow_reader = pytest.importorskip("datasets.arrow_reader")
    sign = "%" if percent else ""
    text = f"train[{'' if first is None else f'{first}{sign}'}:{'' if stop is None else f'{stop}{sign}'}]"
    try:
        (theirs,) = arrow_reader.ReadInstruction.from_spec(text).to_absolute({"train": rows})
    except (ValueError, AssertionError):
        with pytest.raises(DataError):
            split_and_part(text, "data.split")
        return
    _, part = split_and_part(text, "data.split")
    assert part is not None
    assert part.bounds(rows) == (theirs.from_, theirs.to)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), BOUND, BOUND, st.booleans())
def test_a_part_is_cut_from_the_files_of_a_split_in_order(
    tmp_path_factory: pytest.TempPathFactory,
    counts: list[int],
    first: int | None,
    stop: int | None,
    percent: bool,
) -> None:
    sign = "%" if percent else ""
    first, stop = (bound if bound is None or percent else bound // 10 for bound in (first, stop))
    text = f"train[{'' if first is None else f'{first}{sign}'}:{'' if stop is None else f'{stop}{sign}'}]"
    try:
        _, part = split_and_part(text, "data.split")
    except DataError:
        assert percent
        return
    assert part is not None
    start, end = part.bounds(sum(counts))
    folder = write(tmp_path_factory.mktemp("rows") / "of", *counts)
    try:
        found = answers(find_sources([str(folder)], Reading(), Wanted(text)))
    except DataError as error:
        assert start >= end, error
        return
    assert found == list(range(start, end))


def test_rows_keep_their_place_and_faults_outside_do_not_count(tmp_path: Path) -> None:
    folder = write(tmp_path / "of", 3, 5)
    rest = (folder / "train-1.jsonl").read_text().splitlines()
    bad = [json.dumps({"instruction": "a"}), "{", *rest[2:]]
    (folder / "train-1.jsonl").write_text("\n".join(bad))
    sources = find_sources([str(folder)], Reading(), Wanted("train[5:-1]"))
    assert answers(sources) == [5, 6]
    assert "train-1.jsonl (all but rows from 3 to 4)" in sources.left_out
    reader = sources.reader()
    list(reader.chunks())
    index = RowIndex(sources, reader.summaries)
    assert index.place(0).endswith("train-1.jsonl row 3")
    assert [row.content.output for row in index.read([1])] == ["6"]
    with pytest.raises(DataError) as caught:
        answers(find_sources([str(folder)], Reading(), Wanted("train[4:]")))
    assert "train-1.jsonl row 2" in caught.value.problems[0].place


def test_rows_that_are_held_out_are_not_trained(tmp_path: Path) -> None:
    folder = str(write(tmp_path / "of", 4, 6))
    for split, held, trained in (
        ("train[:80%]", "train[80%:]", range(8)),
        ("train", "train[2:5]", [0, 1, 5, 6, 7, 8, 9]),
        ("train[1:6]", "train[-5:]", range(1, 5)),
    ):
        sources = find_sources([folder], Reading(), Wanted(split), [folder], Wanted(held, "data.eval_split"))
        assert answers(sources, heldout=False) == list(trained)
        _, part = split_and_part(held, "")
        assert part is not None
        assert answers(sources, heldout=True) == list(range(*part.bounds(10)))


@given(st.lists(st.tuples(st.integers(0, 9), st.none() | st.integers(0, 9)), max_size=4), st.integers(0, 9))
def test_without_leaves_exactly_the_other_rows(others: list[tuple[int, int | None]], first: int) -> None:
    def file(first: int, stop: int | None) -> SourceFile:
        return SourceFile("s", "s", Path("s"), "", first=first, stop=stop)

    def rows(file: SourceFile) -> set[int]:
        return set(range(file.first, 12 if file.stop is None else file.stop))

    others = [(start, stop) for start, stop in others if stop is None or start < stop]
    pieces = without(file(first, None), [file(*other) for other in others])
    kept = set(range(first, 12)) - {number for other in others for number in rows(file(*other))}
    assert sorted(number for piece in pieces for number in rows(piece)) == sorted(kept)


@pytest.mark.parametrize(
    "split", ["train[1]", "train[:10", "train[a:]", "train[:5]+test[:5]", "train[:10%](pct1_dropremainder)"]
)
def test_other_words_are_refused(split: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no part of a split") as caught:
        find_sources([str(write(tmp_path / "of", 3))], Reading(), Wanted(split))
    assert caught.value.problems[0].place == "data.split"


def test_a_part_without_rows_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "of", 3) / "train-0.jsonl"
    for split in ("train[3:]", "train[2:2]", "train[0%:10%]"):
        with pytest.raises(DataError, match="has no rows"):
            list(find_sources([str(file)], Reading(), Wanted(split)).reader().chunks())


def test_one_file_is_read_no_further_than_its_part(tmp_path: Path) -> None:
    file = SourceFile("s", "s", tmp_path / "not there.jsonl", "")
    _, part = split_and_part("train[2:7]", "data.split")
    assert part is not None
    assert [(each.first, each.stop) for each in cut([file], part, "data.split", "utf-8", exact=False)] == [
        (2, 7)
    ]


def test_the_ledger_of_a_part_closes(tiny: list[str], cli: Cli) -> None:
    model, data = (word.partition("=")[2] for word in tiny[:2])
    words = ["check", "--model", model, "--data", data, *tiny[2:], "--json", "data.eval_split=train[-4:]"]
    done = cli(*words, "data.split=train[10:75%]")
    assert done.code == 0, done.err
    ledger = json.loads(done.out)["ledger"]
    assert (ledger["num_rows"], ledger["trained"]["rows"], ledger["held_out"]["rows"]) == (30, 26, 4)
