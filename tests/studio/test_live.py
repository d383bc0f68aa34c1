"""A growing run: its pages read only what is new, and one watcher serves any number of them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.report.runs import write_run
from tests.studio.pages import Studio

from lorafit.errors import RunError
from lorafit.observe.run_summary import summarize
from lorafit.report.run_data import read_facts
from lorafit.run_dir import RunDirectory
from lorafit.studio import live, watch
from lorafit.studio.folder import Folder
from lorafit.studio.live import LiveRun
from lorafit.studio.watch import LIST, Watcher


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", 80)


@settings(deadline=None, max_examples=30)
@given(cuts=st.lists(st.integers(0, 30_000), max_size=6), torn=st.booleans())
def test_what_is_read_in_pieces_is_what_is_read_at_once(whole: Path, cuts: list[int], torn: bool) -> None:
    run = RunDirectory(whole)
    content = run.metrics_file.read_bytes()
    damaged = content.replace(b'"loss"', b"\xff", 1) if torn else content
    run.metrics_file.write_bytes(b"")
    try:
        reader = LiveRun(run)
        with run.metrics_file.open("ab", buffering=0) as file:
            start = 0
            for end in [*sorted(min(cut, len(damaged)) for cut in cuts), len(damaged)]:
                file.write(damaged[start:end])
                reader.facts()
                start = end
        ours, theirs = reader.facts(), read_facts(run)
        assert ours.summary == summarize(run) == theirs.summary
        assert ours.events == theirs.events
        assert ours.missing == theirs.missing
        for name, curve in theirs.steps.curves.items():
            assert ours.steps.curves[name].points() == curve.points()
        assert ours.steps.sums == pytest.approx(theirs.steps.sums)
    finally:
        run.metrics_file.write_bytes(content)


def test_only_new_lines_are_read_and_a_replaced_file_from_its_start(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, reads = RunDirectory(whole), []
    original = live.read_new

    def read_new(path: Path, start: int, most: int) -> bytes:
        block = original(path, start, most)
        reads.append((start, len(block)))
        return block

    monkeypatch.setattr(live, "read_new", read_new)
    reader, size = LiveRun(run), run.metrics_file.stat().st_size
    reader.facts()
    reader.facts()
    assert reads == [(0, size), (size, 0), (size, 0)]
    reads.clear()
    shorter = b"".join(run.metrics_file.read_bytes().splitlines(keepends=True)[:20])  # as a resume cuts it
    content = run.metrics_file.read_bytes()
    other = run.path / "other"
    other.write_bytes(shorter)
    other.replace(run.metrics_file)
    try:
        assert reader.facts().summary.step == 15
        assert reads[0] == (0, len(shorter))
    finally:
        run.metrics_file.write_bytes(content)


def heard(watcher: Watcher, count: int, act: Any) -> list[tuple[list[str], list[str]]]:
    """What each of `count` pages hears: first, and after `act`."""

    async def page(is_listening: asyncio.Event) -> list[list[str]]:
        got = []
        async for event in watcher.events():
            if event.startswith(b"data: "):
                got.append(json.loads(event.removeprefix(b"data: ")))
                is_listening.set()
            if len(got) == 2:
                break
        return got

    async def all_pages() -> list[Any]:
        listening = [asyncio.Event() for _ in range(count)]
        pages = [asyncio.create_task(page(one)) for one in listening]
        await asyncio.sleep(0)  # all have begun: they hear of the same first look
        looking = asyncio.create_task(watcher.run())
        for one in listening:
            await one.wait()
        act()
        got = await asyncio.gather(*pages)
        looking.cancel()
        return got

    return asyncio.run(all_pages())


def test_ten_pages_hear_of_a_new_line_and_one_watcher_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(write_run(tmp_path / "run", 10))
    looks = []
    original = watch.signs
    monkeypatch.setattr(watch, "signs", lambda one: looks.append(one) or original(one))
    monkeypatch.setattr(watch, "PERIOD", 0.01)
    folder = Folder(tmp_path)
    folder.scan()
    watcher = Watcher(folder, lambda: False)

    def append() -> None:
        looks.clear()
        with run.metrics_file.open("a") as file:
            file.write('{"event": "note", "text": "x", "level": "info"}\n')

    name = folder.id_of(run.path)
    for first, second in heard(watcher, 10, append):
        assert {*first} == {*second} == {name, LIST}, "a new stream hears of all runs, then of what changes"
    assert len(looks) < 10, "each page would look by itself"
    assert watch.PERIOD < 1
    assert not watcher._listeners


def test_a_page_hears_that_its_run_is_gone_also_where_the_search_for_new_runs_misses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page that was drawn while the run was being removed has no other way to know."""
    monkeypatch.setattr(watch, "PERIOD", 0.01)
    monkeypatch.setattr(watch, "SCAN_EVERY", 1)
    run = write_run(tmp_path / "runs" / "run", 2)
    folder = Folder(tmp_path / "runs")
    name = folder.id_of(run)
    ((first, second),) = heard(Watcher(folder, lambda: False), 1, lambda: run.rename(tmp_path / "gone"))
    assert {*first} == {*second} == {name, LIST}


def test_a_stream_of_an_empty_folder_hears_of_the_list_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page that had no answer for a while hears that the studio is there again."""
    monkeypatch.setattr(watch, "PERIOD", 0.01)
    watcher = Watcher(Folder(tmp_path / "none"), lambda: False)
    ((first, second),) = heard(watcher, 1, lambda: write_run(tmp_path / "none" / "run", 2))
    assert first == [LIST]
    assert LIST in second
    assert len(second) == 2


def test_a_look_that_fails_is_not_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch, "PERIOD", 0.01)
    fails = [RunError("no space left"), OSError(5, "input/output error")]

    def advance() -> bool:
        if fails:
            raise fails.pop()
        return False

    watcher = Watcher(Folder(tmp_path), advance)
    ((_, second),) = heard(watcher, 1, lambda: write_run(tmp_path / "run", 2))
    assert LIST in second
    said = capsys.readouterr().err
    assert "no space left" in said
    assert "input/output error" in said


def test_the_period_shows_a_line_within_a_second() -> None:
    assert watch.PERIOD <= 0.5


def test_a_million_steps_stay_quick(tmp_path: Path) -> None:
    """The curves of a long run are of bounded size, and a new line costs no reading of the old ones."""
    run = RunDirectory(write_run(tmp_path / "run", 9_000))
    reader = LiveRun(run)
    reader.facts()
    before = reader._growing._read
    with run.metrics_file.open("ab") as file:
        file.write(run.metrics_file.read_bytes().splitlines(keepends=True)[-5])
    facts = reader.facts()
    assert reader._growing._read > before
    assert len(facts.steps.curves["loss"].points()) <= 2 * 8192 + 2


def test_the_list_reads_only_the_new_lines_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(write_run(tmp_path / "run", 50))
    summaries, starts = live.Summaries(), []
    original = live.read_new
    monkeypatch.setattr(
        live, "read_new", lambda path, start, most: starts.append(start) or original(path, start, most)
    )
    assert summaries.of(run) == summarize(run)
    size = run.metrics_file.stat().st_size
    starts.clear()
    summaries.of(run)
    assert starts == [], "nothing has changed"
    for line in (b'{"event": "step", "step": 51, "loss": 0.25}\n', b'{"event": "step", "step\n', b"\xff\n"):
        with run.metrics_file.open("ab") as file:
            file.write(line)
        assert summaries.of(run) == summarize(run), line
    assert starts[0] == size


def test_a_long_run_is_shown_before_all_its_steps_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_BLOCK", 4096)
    monkeypatch.setattr(live, "FIRST_SECONDS", -1.0)  # a block per request
    write_run(tmp_path / "run", 300)
    studio = Studio(tmp_path)
    address = f"/runs/{studio.ids()['run']}/live"
    pages = [studio.ask(address).text for _ in range(30)]
    assert "data-more" in pages[0]
    assert ">finished</span>" in pages[0], "what is known at once is the whole run's"
    assert "data-more" not in pages[-1]
    monkeypatch.undo()
    assert Studio(tmp_path).ask(address).text == pages[-1]


def test_the_page_shows_the_view_that_is_asked_for(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 100)
    studio = Studio(tmp_path)
    address = f"/runs/{studio.ids()['run']}/live"
    whole, part = studio.ask(address).text, studio.ask(f"{address}?from=20&to=40&smooth=none").text
    assert ">100</text>" in whole
    assert ">100</text>" not in part.partition('id="notes"')[0]
    assert ">40</text>" in part
    for query in ("from=40&to=20", "from=nan&to=inf", "from=x", "smooth=%00", "from=-1e300&to=1e300"):
        assert studio.ask(f"{address}?{query}").status_code == 200, query


def test_other_json_files_of_a_run_become_tables(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 10)
    (folder / "row-losses.jsonl").write_text('{"row": 1, "loss": 0.5}\n{"row": 2, "loss": 0.25}\n')
    (folder / "ranks.json").write_text('{"q_proj": 8, "v_proj": 4}')
    page = Studio(tmp_path)
    text = page.ask(f"/runs/{page.ids()['run']}").text
    for said in ("row-losses.jsonl", "ranks.json", "<td>0.25</td>", "<td>q_proj</td>"):
        assert said in text
