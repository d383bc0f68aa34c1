"""Sources: every kind of file gives the same rows, and every fault names file, line and fix."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.data.folders import SourceFile, Wanted
from lorafit.data.formats import Instruction, Row, Text
from lorafit.data.open_text import LEAST_UNPACKED
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
    (tmp_path / "blank.csv").write_text("\n\ninstruction;output\na, b;c\n")
    [row] = load_rows([str(tmp_path / "blank.csv")]).rows
    assert (row.content, row.place) == (
        Instruction("a, b", "", "c"),
        f"{tmp_path / 'blank.csv'} row 1, line 4",
    )
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


texts = st.text(st.characters(codec="cp949", exclude_characters="\r\0"), min_size=1, max_size=12).filter(
    str.strip
)
row_lists = st.lists(
    st.fixed_dictionaries({"instruction": texts, "input": st.just(""), "output": texts}), min_size=1
)


def as_json(rows: list[dict[str, str]], layout: str) -> str:
    by_column = {key: [row[key] for row in rows] for key in rows[0]}
    indent = 1 if "indented" in layout else None
    values: dict[str, object] = {
        "array": rows,
        "data": {"version": "1", "data": rows},
        "columns": by_column,
        "pandas": {key: {str(n): item for n, item in enumerate(items)} for key, items in by_column.items()},
        "split": {"columns": list(by_column), "data": [[row[key] for key in by_column] for row in rows]},
    }
    if (name := layout.split()[0]) in values:
        return json.dumps(values[name], indent=indent, ensure_ascii=False)
    return {"lines": "\n", "commas": ",\n", "blank": "\n\n"}[name].join(
        json.dumps(row, indent=indent, ensure_ascii=False) for row in rows
    )


def as_csv(rows: list[dict[str, str]], separator: str, index: str | None) -> str:
    with io.StringIO(newline="") as out:
        first = [] if index is None else [index]
        writer = csv.writer(out, delimiter=separator)
        writer.writerow([*first, *rows[0]])
        writer.writerows(
            [*([number] if first else []), *(row[key] for key in rows[0])] for number, row in enumerate(rows)
        )
        return out.getvalue()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda content: pyarrow.Codec("zstd").compress(content, asbytes=True),
}


@given(
    rows=row_lists,
    shape=st.sampled_from(
        [f"json {a} {b}" for a in ("array", "data", "columns", "pandas", "split", "lines", "commas", "blank")
         for b in ("", "indented")]
        + [f"csv {a}" for a in (",", ";", "\t", "|")]
    ),
    suffix=st.sampled_from([".json", ".jsonl", ".ndjson"]),
    index=st.sampled_from([None, "", "Unnamed: 0", "__index_level_0__"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp949", "UTF-32"]),
    packed=st.sampled_from(list(PACKERS)),
)  # fmt: skip
def test_rows_in_any_layout_encoding_and_container_are_the_same_rows(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[dict[str, str]],
    shape: str,
    suffix: str,
    index: str | None,
    encoding: str,
    packed: str,
) -> None:
    kind, _, layout = shape.partition(" ")
    content = as_json(rows, layout) if kind == "json" else as_csv(rows, layout, index)
    if kind == "csv":
        suffix = ".tsv" if layout == "\t" else ".csv"
    path = tmp_path_factory.getbasetemp() / f"rows{suffix}{packed}"
    path.write_bytes(PACKERS[packed](content.encode(encoding)))
    loaded = load_rows([str(path)], encoding=encoding)
    assert [row.content for row in loaded.rows] == [
        Instruction(row["instruction"], "", row["output"]) for row in rows
    ]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "txt"])
@given(lines=st.integers(0, 5), block=st.sampled_from([4, 1 << 20]))
def test_a_byte_that_is_no_text_is_named_with_its_line(
    tmp_path_factory: pytest.TempPathFactory, kind: str, lines: int, block: int
) -> None:
    path = tmp_path_factory.getbasetemp() / f"wrong.{kind}"
    path.write_bytes(b"text\n" * lines + "\ud55c\uad6d".encode("cp949") + b"\nmore\n")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DataError) as caught:
        patch.setattr("lorafit.data.open_text._BLOCK", block)
        load_rows([str(path)])
    [problem] = caught.value.problems
    assert problem.message == "is not UTF-8: byte 0xC7"
    assert problem.place == f"{path} line {lines + 1}"
    assert "data.encoding=cp949" in problem.hint


def test_a_byte_order_mark_names_the_encoding(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("text\na\n".encode("utf-16"))
    with pytest.raises(DataError) as caught:
        load_rows([str(path)])
    assert caught.value.problems[0].hint == "data.encoding=utf-16 reads it"
    assert len(load_rows([str(path)], encoding="utf-16").rows) == 1
    path.write_bytes(b"text\na\n")
    with pytest.raises(DataError, match="is not utf-16"):
        load_rows([str(path)], encoding="utf-16")


def test_packed_files_that_are_cut_or_grow_too_large(tmp_path: Path) -> None:
    whole = PACKERS[".zst"](b'{"text": "a"}\n' * 1000)
    for content in (b"no zstd", whole[:-5]):
        (tmp_path / "a.jsonl.zst").write_bytes(content)
        with pytest.raises(DataError, match="is not a whole zstd file"):
            load_rows([str(tmp_path / "a.jsonl.zst")])
    (tmp_path / "a.txt.zst").write_bytes(PACKERS[".zst"](b"a" * (LEAST_UNPACKED + (1 << 21))))
    with pytest.raises(DataError, match="unpacks to more than 100 times its size"):
        load_rows([str(tmp_path / "a.txt.zst")])


def test_a_text_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text('One.\n\n{"text": 1}\n')
    (tmp_path / "b.md").write_bytes(b"# Two\r\n")
    rows = load_rows([str(tmp_path)])
    assert [row.content for row in rows.rows] == [Text('One.\n\n{"text": 1}\n'), Text("# Two\n")]


GOOD, BAD = '{"instruction": "a", "output": "b"}', '{"instruction": "a", "output": null}'


@given(
    lines=st.lists(
        st.sampled_from([GOOD, BAD, "nope", '{"instruction": "a"}', '"text"']), min_size=1, max_size=9
    ),
    size=st.integers(1, 4),
)
def test_bad_rows_are_left_out_and_counted(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], size: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "bad.jsonl"
    path.write_text(f"{GOOD}\n" + "".join(line + "\n" for line in lines))
    reader = find_sources([str(path)], Reading("alpaca", drops=True)).reader()
    chunks = list(reader.chunks(size))
    kept = [row.number for chunk in chunks for row in chunk.rows]
    dropped = sorted(number for chunk in chunks for number, _ in chunk.dropped)
    assert kept == [0, *(number for number, line in enumerate(lines, 1) if line == GOOD)]
    assert sorted([*kept, *dropped]) == list(range(1 + len(lines)))
    assert sorted(number for numbers in reader.dropped.values() for number in numbers) == dropped
    assert reader.summaries[0].num_rows == 1 + len(lines)
    index = RowIndex(find_sources([str(path)], Reading("alpaca", drops=True)), reader.summaries)
    assert [row.number for row in index.read(kept)] == kept
    for number in dropped[:1]:
        with pytest.raises(DataError, match=f"row {number + 1} is left out: "):
            find_sources([str(path)], Reading("alpaca", drops=True)).reader().read([number])


def test_no_usable_row_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{BAD}\n" * 3 + "nope\n")
    with pytest.raises(DataError, match=r"no row can be used: 3 rows: `output` is null; 1 row: is not JSON"):
        load_rows([str(path)], "alpaca", drops=True)
    with pytest.raises(DataError) as caught:
        load_rows([str(path)], "alpaca")
    assert "data.bad_rows" not in str(caught.value)  # it would leave nothing


def test_reasons_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "roles.jsonl"
    rows = [{"messages": [{"role": f"r{n}", "content": "a"}]} for n in range(200)]
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
        + json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    )
    reader = find_sources([str(path)], Reading(drops=True)).reader()
    list(reader.chunks())
    [(reason, numbers)] = (
        reader.dropped.items()
    )  # one fault is one reason, also with another value in each row
    assert reason.startswith("`role` is 'r0'")
    assert len(numbers) == 200
    with path.open("a") as file:
        keys = [chr(97 + n // 26) + chr(97 + n % 26) for n in range(100)]
        file.writelines(f'\n{{"{key}": 1, "{key}": 2}}' for key in keys)
    reader = find_sources([str(path)], Reading(drops=True)).reader()
    list(reader.chunks())
    assert sum(map(len, reader.dropped.values())) == 300
    assert len(reader.dropped) == 51
    path.write_text(path.read_text().partition('\n{"aa"')[0])
    with pytest.raises(DataError) as caught:
        load_rows([str(path)])
    [problem] = caught.value.problems
    assert problem.message.startswith("200 rows, the first: `role` is 'r0'")
    assert problem.place == f"{path} rows 1, 2, 3, 4, 5 and 195 more"
