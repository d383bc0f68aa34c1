"""The page of data: any page and any search of a large file, rows as the model reads them, verdicts, dropped files."""

from __future__ import annotations

import json
import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.report.runs import HOSTILE
from tests.report.test_report import Structure
from tests.studio.pages import Studio
from tests.tiny_models import write_model

from lorafit.data.sources import find_sources
from lorafit.studio import row_pages
from lorafit.studio.row_pages import RowPages, make_room
from lorafit.studio.row_turns import divided


def write(path: Path, count: int, start: int = 0) -> Path:
    rows = [
        {"instruction": f"question {n}", "output": f"answer {n} Ünï"} for n in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pages_of(*paths: Path) -> RowPages:
    pages = RowPages(find_sources([str(path) for path in paths]))
    pages.wait(2**60, 600)
    return pages


@settings(deadline=None, max_examples=8)
@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=3), block=st.integers(1, 16), data=st.data())
def test_any_page_holds_the_rows_that_training_reads(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], block: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    files = [write(folder / f"{index}.jsonl", count, 100 * index) for index, count in enumerate(counts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_pages, "BLOCK", block)
        pages = pages_of(*files)
        rows = [row for chunk in find_sources(list(map(str, files))).reader().chunks() for row in chunk.rows]
        assert pages.num_rows == len(rows) == sum(counts)
        first = data.draw(st.integers(0, len(rows)))
        shown = pages.page(first, 7)
        assert [pages.row(raw) for raw in shown] == rows[first : first + 7]
        one = data.draw(st.sampled_from(rows))
        assert one.number in pages.search(one.content.turns()[0].content.upper())  # type: ignore[index,union-attr]


def test_a_page_of_a_large_file_reads_one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_pages, "BLOCK", 50)
    pages = pages_of(write(tmp_path / "rows.jsonl", 1000))
    read: list[int] = []
    original = RowPages._table
    monkeypatch.setattr(RowPages, "_table", lambda self, block: read.append(block) or original(self, block))
    assert [row.number for row in pages.page(955, 20)] == list(range(955, 975))
    assert read == [19]


def test_rows_are_shown_as_the_model_reads_them_and_found(tmp_path: Path) -> None:
    model = write_model(tmp_path / "내 모델 (1) & more")
    rows = write(tmp_path / "내 행 [1] %41+.jsonl", 60)
    studio = Studio(tmp_path)
    page = studio.ask("/data", params={"data.path": str(rows), "model.name": str(model)}).text
    assert '<span class="trained">answer 3 Ünï</span>' in page
    assert "alpaca" in page
    assert "answer 20" not in page
    assert "answer 20" in studio.ask("/data", params={"data.path": str(rows), "first": "21"}).text
    found = studio.ask("/data", params={"data.path": str(rows), "q": "ANSWER 59 ü"}).text
    assert "answer 59" in found
    assert "answer 5 " not in found
    chosen = studio.ask("/data", params={"data.path": str(rows), "rows": "3,59"}).text
    assert ("answer 2 " in chosen, "answer 58" in chosen, "answer 4 " in chosen) == (True, True, False)


def test_rows_that_are_still_being_read_come_by_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafit.studio import data_page

    goes_on, original = threading.Event(), row_pages.read_file

    def read_file(*args: Any, **options: Any) -> Any:
        goes_on.wait()
        return original(*args, **options)

    monkeypatch.setattr(row_pages, "read_file", read_file)
    monkeypatch.setattr(data_page, "FIRST_SECONDS", 0.0)
    studio, asked = Studio(tmp_path), {"data.path": str(write(tmp_path / "rows.jsonl", 2))}
    page = studio.ask("/data", params=asked).text
    assert "data-every" in page
    assert "data-over" not in page
    assert "No row fits" not in page, "it is not known yet"
    goes_on.set()
    (pages,) = studio.app.state.row_pages.values()
    pages.wait(2**60, 600)
    page = studio.ask("/data", params=asked).text
    assert "data-every" not in page
    assert "data-over" in page
    assert "answer 1" in page


def test_the_next_studio_takes_the_rows_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write(tmp_path / "rows.jsonl", 30)
    first = pages_of(rows)
    monkeypatch.setattr(row_pages, "read_file", lambda *_, **__: pytest.fail("the file is read again"))
    again = pages_of(rows)
    assert (again.num_rows, again.layouts, again.problems) == (30, first.layouts, [])
    assert again.page(10, 5) == first.page(10, 5)
    first.path.joinpath("000000.arrow").unlink()  # a part is lost: all are read
    assert not again._is_known()


def test_the_cache_keeps_what_was_looked_at_last(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("oldest", "used", "newer", "newest")]
    for age, folder in enumerate(folders):
        folder.mkdir()
        (folder / "000000.arrow").write_bytes(b"x" * 100)
        os.utime(folder, (age, age))
    make_room(tmp_path / "used", most=300)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["newer", "newest", "used"]
    make_room(tmp_path / "used", most=10)
    assert [path.name for path in tmp_path.iterdir()] == ["used"]


def test_rows_of_no_format_are_shown_with_the_reason_and_their_columns(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"frage": "Wer?", "wort": ["Ich."]}\n')
    page = Studio(tmp_path).ask("/data", params={"data.path": str(rows)}).text
    assert "no format fits" in page
    assert "[&#34;Ich.&#34;]" in page
    assert page.count("<option>frage</option>") == page.count("data-column=") > 5


THINKS = {
    "messages": [
        {"role": "user", "content": "<think> is no thought here"},
        {
            "role": "assistant",
            "reasoning_content": "first",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "name": "look", "content": "found"},
        {"role": "assistant", "content": "second</think>It is <b>."},
    ]
}


def test_thoughts_calls_and_results_stand_apart(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(THINKS) + "\n")
    page = Studio(tmp_path).ask("/data", params={"data.path": str(rows)}).text
    parts = re.findall(r'<div class="part (\w+)">(?:<span[^>]*>[^<]*</span> )?([^<]*)</div>', page)
    assert parts == [
        ("text", "&lt;think&gt; is no thought here"),
        ("thought", "first"),
        ("call", "look({&#34;a&#34;: 1})"),
        ("result", "look: found"),
        ("thought", "second"),
        ("text", "It is &lt;b&gt;."),
    ]


@given(text=st.lists(st.sampled_from(["<think>", "</think>", "<tool_call>", "</tool_call>", "x", " ", "\n"])))
def test_a_divided_text_loses_nothing_but_marks_and_blanks(text: list[str]) -> None:
    whole = "".join(text)
    kept = "".join(part for _, part in divided(whole))
    assert kept.count("x") == whole.count("x")


def test_both_answers_of_a_preference_are_shown(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "which?", "chosen": "good", "rejected": "bad"}) + "\n")
    studio, asked = Studio(tmp_path), {"data.path": str(rows)}
    assert "train.method=dpo" in studio.ask("/data", params=asked).text
    page = studio.ask("/data", params={**asked, "train.method": "dpo"}).text
    turns = page.partition('<dl class="turns">')[2].partition("</dl>")[0]
    assert re.findall(r"<dt>(\w+)</dt>", turns) == ["prompt", "chosen", "rejected"]


def test_columns_can_be_given_by_hand(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"frage": "Wer?", "wort": "Ich."}\n')
    studio = Studio(tmp_path)
    asked = {"data.path": str(rows), "data.columns": "{instruction: frage, output: wort}"}
    assert "instruction ← frage" in studio.ask("/data", params=asked).text
    assert (
        "error" not in studio.ask("/data", params={"data.path": str(rows)}).text.lower().partition("<main")[0]
    )


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "\0\0", '{"a": ' * 5000, "\ud83d"])
def test_a_file_that_is_no_rows_is_told(tmp_path: Path, content: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(content, errors="surrogatepass")
    page = Studio(tmp_path).ask("/data", params={"data.path": str(file)})
    assert page.status_code == 200
    assert 'class="card problem"' in page.text or 'class="wrong"' in page.text


def test_hostile_rows_are_text(tmp_path: Path) -> None:
    pages = []
    for name, text in (("plain", ""), ("hostile", "".join(HOSTILE[:4]))):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps([{"instruction": f"a{text}", "output": f"b{text}"}]))
        pages.append(Studio(tmp_path).ask("/data", params={"data.path": str(file)}).text)
    assert Structure.of(pages[0]).tags == Structure.of(pages[1]).tags


_NONE = {"rows": 0, "total": 0, "trained": 0, "masked": 0, "truncated": 0}
LEDGER = {
    "num_rows": 20,
    "trained": {"rows": 20, "total": 300, "trained": 100, "masked": 200, "truncated": 0},
    "held_out": _NONE,
    "dropped": {},
    "lengths": {"mean": 15.0, "p50": 15, "p90": 19, "max": 19},
}


def test_verdicts_link_to_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorafit.studio import data_page

    asked: list[list[str]] = []
    verdict = {
        "name": "duplicates",
        "verdict": "warn",
        "message": "2 <b>rows</b>",
        "place": "",
        "hint": "",
        "rows": [3, 17],
    }

    async def only_one(request: object, kind: str, words: list[str]) -> tuple[int, str]:
        asked.append(words)
        lengths = {"edges": [0, 10, 20], "training": [2, 18]}
        checked = {"verdicts": [verdict], "failed": False, "ledger": LEDGER, "lengths": lengths}
        return 0, json.dumps(checked) + "\n"

    monkeypatch.setattr(data_page, "only_one", only_one)
    rows = write(tmp_path / "rows.jsonl", 3)
    page = Studio(tmp_path).ask("/data/check", params={"data.path": str(rows)}).text
    assert "rows=3,17#rows" in page
    assert "2 &lt;b&gt;rows" in page
    assert page.count('<rect class="train"') == 4, "rows, tokens, and two lengths"
    assert "Rows by their length in tokens: 20 rows" in page
    assert asked == [["check", "--data-only", "--json", "--data", str(rows)]]


def test_a_dropped_file_arrives_whole_and_replaces_none(tmp_path: Path) -> None:
    studio = Studio(tmp_path)

    def put(name: str, part: str, pieces: list[bytes]) -> dict[str, str]:
        offset = 0
        for index, piece in enumerate(pieces):
            params = {
                "name": name,
                "id": (part * 32)[:32],
                "offset": offset,
                "last": int(index == len(pieces) - 1),
            }
            reply = studio.ask("/data/upload", "POST", params=params, content=piece)
            offset += len(piece)
        assert reply.status_code == 200, reply.text
        return reply.json()  # type: ignore[no-any-return]

    first = Path(put("rows.jsonl", "a", [b"one", b"two", b"three"])["path"])
    assert first == tmp_path / "uploads" / "rows.jsonl"
    assert first.read_bytes() == b"onetwothree"
    second = Path(put("rows.jsonl", "b", [b"other"])["path"])
    assert second != first
    assert first.read_bytes() == b"onetwothree"
    for name in (
        "../x.json",
        "x.py",
        "a/b.json",
        ".json",
        "x.json\0",
        "config.yaml",
        "a\\b.json",
        "x" * 300 + ".json",
    ):
        params = {"name": name, "id": "c" * 32, "offset": 0, "last": 1}
        refused = studio.ask("/data/upload", "POST", params=params, content=b"x")
        assert refused.status_code == 400
        assert 'class="card problem"' in refused.text, "the page shows why"
    for name in (
        "rows (1).json",
        "데이터 셋+2.jsonl.zst",
        "a, b & c's.feather",
        "X.JSON",
    ):  # as browsers name downloads
        assert Path(put(name, f"{len(name):02x}", [b"x"])["path"]).name == name
    params = {"name": "x.json", "id": "d" * 32, "offset": 5, "last": 1}
    assert studio.ask("/data/upload", "POST", params=params, content=b"x").status_code == 400
    assert {first.name, second.name} < {path.name for path in (tmp_path / "uploads").iterdir()}
