"""Sources: every kind of file gives the same rows, and every fault names file, line and fix."""

from __future__ import annotations

import csv
import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.data.folders import SourceFile, Wanted
from lorafit.data.formats import Instruction, Row
from lorafit.data.readers import read_file
from lorafit.data.row_faults import RowFaults
from lorafit.data.row_index import RowIndex
from lorafit.data.sources import Reading, RowReader, describe, find_sources
from lorafit.errors import DataError, Problem, Problems

ROWS = [
    {"instruction": "Say it.", "input": "", "output": 'A "quoted", line\nbreak'},
    {"instruction": "한국어", "input": "x", "output": "네"},
]
CONTENTS = [Instruction(row["instruction"], row["input"], row["output"]) for row in ROWS]


@dataclass
class Loaded:
    rows: list[Row]
    lines: list[int]
    sources: list[SourceFile]
    format: str
    reason: str


def load_rows(
    specs: list[str],
    format: str = "auto",  # noqa: A002 (the name of the setting)
    size: int = 2048,
    wanted: Wanted | None = None,
    **reading: Any,
) -> Loaded:
    """All rows at once."""
    sources = find_sources(specs, Reading(format, **reading), wanted or Wanted())
    reader = sources.reader()
    chunks = list(reader.chunks(size))
    assert all(0 < len(chunk.rows) <= size for chunk in chunks)
    rows = [row for chunk in chunks for row in chunk.rows]
    assert sum(summary.num_rows for summary in reader.summaries) == len(rows)
    numbers = list(range(0, len(rows), 3))
    assert RowIndex(sources, reader.summaries).read(numbers) == [rows[number] for number in numbers]
    lines = [line for chunk in chunks for line in chunk.lines]
    return Loaded(rows, lines, list(sources.files), *describe(sources, reader.summaries))


def write(path: Path) -> Path:
    """ROWS in the kind of file that the name asks for."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    table = pyarrow.Table.from_pylist(ROWS)
    if kind == "json":
        content = json.dumps(ROWS, ensure_ascii=False)
    elif kind in ("jsonl", "ndjson"):
        content = "\n\n".join(json.dumps(row) for row in ROWS)
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ROWS[0], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
        return path
    elif kind == "parquet":
        pyarrow.parquet.write_table(table, path)
        return path
    else:
        opener = pyarrow.ipc.new_stream if kind == "arrow" else pyarrow.ipc.new_file
        with opener(str(path), table.schema) as sink:
            sink.write_table(table)
        return path
    encoded = content.encode()
    path.write_bytes(gzip.compress(encoded) if path.suffix == ".gz" else encoded)
    return path


KINDS = ["json", "jsonl", "ndjson", "json.gz", "jsonl.gz", "csv", "tsv", "parquet", "arrow", "feather"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"data.{kind}")
    rows = load_rows([str(path)])
    assert [row.content for row in rows.rows] == CONTENTS
    assert [row.number for row in rows.rows] == [0, 1]
    assert (rows.format, rows.reason) == ("alpaca", "every row has `instruction` and `output`")
    assert rows.sources == [SourceFile(str(path), str(path), path, "")]
    line = {
        "jsonl": ", line 3",
        "ndjson": ", line 3",
        "jsonl.gz": ", line 3",
        "csv": ", line 4",
        "tsv": ", line 4",
    }
    assert rows.rows[1].place == f"{path} row 2{line.get(kind, '')}"
    assert rows.lines[1] == int(line.get(kind, " 0").split()[-1])
    assert load_rows([str(path)], size=1).rows == rows.rows


def test_folders_and_several_sources(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "b.json")
    write(folder / "a.jsonl")
    (folder / "README.md").write_text("no data")
    (folder / "dataset_info.json").write_text("{}")
    (tmp_path / "text.csv").write_text("text\nhello\n")
    rows = load_rows([str(folder), str(tmp_path / "text.csv")])
    assert [source.name for source in rows.sources] == [
        str(folder / "a.jsonl"), str(folder / "b.json"), str(tmp_path / "text.csv")]  # fmt: skip
    assert [row.number for row in rows.rows] == list(range(5))
    assert rows.format == "alpaca+text"
    assert "text.csv: every row has `text`" in rows.reason
    with pytest.raises(DataError, match="`text` is missing"):
        load_rows([str(folder / "b.json")], format="text")
    assert load_rows([str(folder / "b.json")], format="alpaca").reason == "given"


def test_tolerated(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"version": 1, "data": ROWS}).encode())
    assert len(load_rows([str(path)]).rows) == 2
    path.write_text("\n".join(json.dumps(row) for row in ROWS))  # JSON lines under the wrong name
    assert len(load_rows([str(path)]).rows) == 2
    (tmp_path / "long.csv").write_text(f"text\n{'x' * 200_000}\n")
    assert len(load_rows([str(tmp_path / "long.csv")]).rows) == 1


@pytest.mark.parametrize(
    ("name", "content", "message", "place"),
    [
        ("a.json", b'[{"text": "a"},\n {"text" "b"}]', "is not JSON", "a.json line 2 column 10"),
        ("a.json", b'{"a": [{}], "b": [{}]}', "is not a list of rows", "a.json"),
        ("a.json", b'{"a": 1}', "no format fits: the rows have `a`", "a.json"),
        ("a.json", b"[]", "has no rows", "a.json"),
        ("a.json", b"[" * 100_000, "is not usable JSON", "a.json"),
        ("a.json", b" \n", "the file is empty", "a.json"),
        ("a.json", b'[{"text": "\xff"}]', "not UTF-8: byte 0xFF", "a.json line 1"),
        ("a.json.gz", b"no gzip", "is not a whole gzip file", "a.json.gz"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "abc"}', mtime=0)[:-9],
            "is not a whole gzip file",
            "a.jsonl.gz",
        ),
        ("a.csv", b"text,text\na,b\n", "repeated names", "a.csv line 1"),
        ("a.csv", b'text\n"a\n', "is not CSV", "a.csv line"),
        ("a.csv", b"text,b\na,b\nc\n", "has 1 fields where the header has 2", "a.csv row 2, line 3"),
        ("a.csv", b"text\n", "has no rows", "a.csv"),
        ("a.parquet", b"no parquet", "is not usable Parquet", "a.parquet"),
        ("a.arrow", b"no arrow", "is not usable Arrow", "a.arrow"),
        ("a.xlsx", b"", "unsupported kind of file '.xlsx'", "a.xlsx"),
    ],
)
def test_faults_name_place_and_fix(
    tmp_path: Path, name: str, content: bytes, message: str, place: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_rows([str(tmp_path / name)])
    [problem] = caught.value.problems
    assert message in problem.message
    assert place in problem.place
    assert problem.hint


def test_all_bad_lines_and_all_sources_are_reported(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text"\n\n{"text": "b"}\nnope\n')
    (tmp_path / "b.json").write_text('[{"text": true}]')
    with pytest.raises(DataError) as caught:
        load_rows(
            [str(tmp_path / "a.jsonl"), str(tmp_path / "b.json"), str(tmp_path / "c.json")], format="text"
        )
    places = [problem.place for problem in caught.value.problems]
    assert [place.removeprefix(f"{tmp_path}/") for place in places] == [
        "a.jsonl row 2, line 2", "a.jsonl row 4, line 5", "b.json row 1, field `text`", "c.json"]  # fmt: skip
    assert "data.bad_rows=drop" in caught.value.problems[1].hint
    assert "data.bad_rows" not in caught.value.problems[2].hint  # nothing would be left


def test_missing_files_suggest_near_names(tmp_path: Path) -> None:
    write(tmp_path / "alpaca_data.json")
    with pytest.raises(DataError, match=r"did you mean .*alpaca_data\.json\?"):
        load_rows([str(tmp_path / "alpaca-data.json")])
    with pytest.raises(DataError, match="does not exist either"):
        load_rows([str(tmp_path / "nowhere" / "a.json")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no data files"):
        load_rows([str(tmp_path / "empty")])
    with pytest.raises(DataError, match="unknown data format"):
        load_rows([str(tmp_path / "alpaca_data.json")], format="alpacca")


@dataclass
class Files:
    paths: list[Path]
    revision: str


def test_hub_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "train.parquet")
    asked: list[object] = []

    def dataset_files(name: str, **options: object) -> Files:
        asked.append((name, options))
        return Files([path], "abc123")

    monkeypatch.setattr("lorafit.hub.client.dataset_files", dataset_files)
    rows = load_rows(["tatsu-lab/alpaca"], wanted=Wanted("test", config="en", revision="main", offline=True))
    options = {"revision": "main", "split": "test", "config": "en", "offline": True}
    assert asked == [("tatsu-lab/alpaca", options)]
    assert rows.sources[0].name == "tatsu-lab/alpaca/train.parquet"
    assert rows.sources[0].revision == "abc123"
    assert rows.rows[1].place == "tatsu-lab/alpaca/train.parquet row 2"


@given(content=st.binary(max_size=60) | st.text('[]{}",:\n\r\0a1\ufeff', max_size=60).map(str.encode))
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "json.gz", "parquet", "arrow"])
def test_any_bytes_are_read_or_reported(
    tmp_path_factory: pytest.TempPathFactory, kind: str, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / f"any.{kind}"
    path.write_bytes(content)
    problems: tuple[Problem, ...] = ()
    try:
        rows = list(read_file(path, str(path)))
        problems = tuple(row.value for row in rows if isinstance(row.value, Problem))
    except DataError as error:
        problems = error.problems
    assert all(str(path) in problem.place for problem in problems)


def test_a_million_bad_lines_are_counted_and_few_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + "nope\n" * 3000)
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n' + '{"text": true}\n' * 3000)
    with pytest.raises(DataError) as caught:
        load_rows([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), str(tmp_path / "c.jsonl")])
    listed = [
        (problem.message, problem.place.removeprefix(f"{tmp_path}/")) for problem in caught.value.problems
    ]
    assert listed == [
        ("3,000 rows: is not JSON: Expecting value (column 1)", "a.jsonl rows 2, 3, 4, 5, 6 and 2,995 more"),
        ("3,000 rows: `text` is true or false, not text", "b.jsonl rows 2, 3, 4, 5, 6 and 2,995 more"),
        ("no such file or folder", "c.jsonl"),
    ]


def test_kinds_of_faults_beyond_a_bound_are_counted(tmp_path: Path) -> None:
    count = Problems.MAX_KEPT + 20
    faults = RowFaults()
    for number in range(count):
        faults.add("a", number, f"a row {number}", Problem(f"`{'x' * number}` is wrong"))
    assert len(faults.problems(count)) == Problems.MAX_KEPT
    assert faults.num_more == 20


def test_rows_read_once_more_are_those_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{number}"}}\n\n' for number in range(10)))
    (tmp_path / "b.csv").write_text("text\n" + "".join(f'"{number}\n"\n' for number in range(10)))
    sources = find_sources([str(tmp_path)])
    reader = sources.reader()
    rows = [row for chunk in reader.chunks(3) for row in chunk.rows]
    wanted = [0, 7, 10, 19]
    assert RowIndex(sources, reader.summaries).read(wanted) == [rows[number] for number in wanted]
    assert RowReader(sources.files).read(range(8, 12)) == rows[8:12]
    with pytest.raises(DataError, match="there is no row 21") as caught:
        RowReader(sources.files).read(range(19, 22))
    assert caught.value.problems[0].hint == "the last row is number 20"
    assert rows[7].place.endswith("a.jsonl row 8, line 15")
    assert reader.progress()[0] == reader.progress()[1] > 0
