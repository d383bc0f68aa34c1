"""The report is made from any files, shows what they hold, and nothing in them becomes part of the page."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.effort import num_calls
from tests.report.runs import HOSTILE, write_run

from lorafit.cli.main import main
from lorafit.data.row_preview import RowView, Stretch
from lorafit.errors import RunError
from lorafit.redact import visible
from lorafit.report.escape import cut, render
from lorafit.report.page import SECTIONS, page, write_report
from lorafit.report.run_data import Facts, read_facts
from lorafit.run_dir import RunDirectory

UNEXPECTED: list[Any] = [
    *(None, True, 0, 1, -1, 1e308, 1e-320, math.nan, math.inf, 10**400, "x", "\ud800"),
    *([], {}, [1], [[]], [{}], {"a": 1}),
]


class Structure(HTMLParser):
    """Tags with their attributes, without what may hold data; and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @classmethod
    def of(cls, text: str) -> Structure:
        parser = cls()
        parser.feed(text)
        parser.close()
        return parser


def facts_of(folder: Path) -> Facts:
    return read_facts(RunDirectory.open(folder))


def test_every_section_is_there_and_says_what_the_files_hold(tmp_path: Path) -> None:
    text = page(facts_of(write_run(tmp_path / "my run")))
    for title, name, _ in SECTIONS:
        assert f'<section id="{name}"><h2>{title}</h2>' in text
    words = " ".join("".join(Structure.of(text).text).split())
    for said in (
        "my run finished learned in part adapter verified, with warnings It learned most",
        "902K parameters, 127K trained",
        "1.900 → 0.402",
        "3 of 20",
        "60 of 60",
        "28 of 28 adapter tensors changed",
        "1 of 2 checks pass",
        "2 rows are in both halves (rows.json rows 3, 17): remove them",
        "the answer is empty: rows 4, 18",
        "sum100",
        "30 tokens, 12 trained",
        "two rows were dropped",
        "step 60: the loss stands still: lower the rate",
        "lorafit train --model demo/model",
        "22" * 32,
        "learning_rate: 0.0002",
        "system promptBe brief.",
        "step 10",
    ):
        assert said in words, said
    assert "<mark>A horse.&lt;/s&gt;</mark>" in text


@pytest.mark.parametrize("proof", ["pass", "warn", "fail", None])
@pytest.mark.parametrize("before", ["pass", "warn", "fail"])
def test_no_badge_of_success_stands_above_a_failed_check(
    tmp_path: Path, proof: str | None, before: str
) -> None:
    run = write_run(tmp_path / "run", ended="ended early")
    checks = json.loads((run / "check.json").read_text())
    (run / "check.json").write_text(json.dumps([{**check, "verdict": before} for check in checks]))
    stored = json.loads((run / "proof.json").read_text())
    (run / "proof.json").write_text(json.dumps({**stored, "verdict": proof}))
    text = page(facts_of(run))
    badges = re.findall('<span class="badge ([a-z-]+)">([^<]+)</span>', text.partition("</header>")[0])
    assert badges[0] == ("ended-early", "ended early")
    assert ("finished", "finished") not in badges
    failed = "fail" in (proof, before)
    assert any(style == "fail" for style, _ in badges) == failed
    assert any("adapter verified" in said for _, said in badges) == (proof in ("pass", "warn") and not failed)


def test_hostile_text_is_only_ever_text(tmp_path: Path) -> None:
    """The page has the same tags and attributes whatever the rows, answers and names say."""
    plain = Structure.of(page(facts_of(write_run(tmp_path / "plain"))))
    for number, poison in enumerate(HOSTILE):
        made = page(facts_of(write_run(tmp_path / f"run{number}", say=lambda text, p=poison: f"{text}{p}")))
        hostile = Structure.of(made)
        assert hostile.tags == plain.tags
        assert made.count("<script") == 1
        made.encode()
        shown = "".join(hostile.text)
        assert re.sub("[\x00\x1b\u202e\ud800\ufeff].*", "", poison) in shown
        assert not re.search("[\x00\x1b\u202e\ufeff]", shown)


def test_the_page_asks_for_nothing_and_allows_one_script(tmp_path: Path) -> None:
    text = page(facts_of(write_run(tmp_path / "run")))
    found = Structure.of(text)
    tags = {tag for tag, _ in found.tags}
    assert not tags & {"img", "iframe", "object", "embed", "form", "base", "audio", "video"}
    attributes = {name for _, names in found.tags for name in names}
    assert not [name for name in attributes if name.startswith("on") or name in ("src", "action", "srcset")]
    links = re.findall(r'href="([^"]*)"', text)
    assert all(link.startswith("#") or link == "data:," for link in links)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert "default-src 'none'" in policy[1]
    assert re.search(r"script-src 'sha256-[A-Za-z0-9+/=]{44}'", policy[1])


def test_ten_thousand_steps_are_a_small_page_quickly(tmp_path: Path) -> None:
    few = RunDirectory.open(write_run(tmp_path / "few", 1_000))
    many = RunDirectory.open(write_run(tmp_path / "many", 10_000))
    assert num_calls(lambda: write_report(many)) < 12 * num_calls(lambda: write_report(few))
    assert write_report(many).stat().st_size < 600_000


@pytest.mark.parametrize(
    "name", ["env", "prompt", "ledger", "rows", "samples", "proof", "check", "metrics", "adapter"]
)
@pytest.mark.parametrize("damage", ["missing", "torn", "other"])
def test_whatever_is_missing_or_damaged_leaves_the_rest(name: str, damage: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    file = next(folder.glob(f"{name}*"))
    if damage == "missing":
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    elif file.is_file():
        file.write_text(file.read_text()[:30] + "\n" if damage == "torn" else '[1, "x"]\n')
    text = page(facts_of(folder))
    assert '<section id="reproduce">' in text
    if name in ("env", "prompt", "ledger", "rows") and damage != "other":
        assert f"{name}.json" in text.partition("<footer>")[2]
    if name == "metrics" and damage != "missing":
        assert "1 damaged lines of metrics.jsonl" in text


def test_damaged_lines_of_the_metrics_are_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    lines[10] = "\x00\x00\x00"
    metrics.write_text("\n".join(lines) + "\n")
    facts = facts_of(folder)
    assert len(facts.steps.curves["loss"].points()) == 59
    assert "1 damaged lines of metrics.jsonl" in page(facts)


def changed(value: Any, random: Random, at: float = 0.12) -> Any:
    """`value` with some of its parts replaced by what nobody expects there."""
    if random.random() < at:
        return random.choice(UNEXPECTED)
    if isinstance(value, dict):
        return {key: changed(part, random) for key, part in value.items()}
    return [changed(part, random) for part in value] if isinstance(value, list) else value


@settings(max_examples=30)
@given(random=st.randoms(use_true_random=False))
def test_whatever_the_files_hold_there_is_a_page(
    random: Random, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = write_run(tmp_path_factory.mktemp("any") / "run", 8)
    for file in folder.glob("*.json"):
        file.write_text(json.dumps(changed(json.loads(file.read_text()), random)))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    events = [changed(json.loads(line), random) for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    page(facts_of(folder)).encode()


@given(st.text())
def test_text_in_a_page_reads_back(text: str) -> None:
    """Apart from characters that cannot be seen, which are shown by their number."""
    row = RowView(0, text, (Stretch(text, "trained", False),), ())
    parsed = Structure.of(render("rows.html", title="", rows=[(row, [])], ids=False, style=""))
    assert visible(text.replace("\r\n", "\n")) in "".join(parsed.text)
    assert [tag for tag, _ in parsed.tags].count("span") == 5


def test_cut_says_how_much_is_missing() -> None:
    assert cut("abc", 3) == "abc"
    assert cut("abcdef", 4) == "abcd [... 2 characters more]"


def lorafit(*words: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["lorafit", *words])
    try:
        main()
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def test_the_command_writes_and_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run")
    assert lorafit("report", str(folder), monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    first = (folder / "report.html").read_bytes()
    other = tmp_path / "other.html"
    assert lorafit("report", str(folder), "--output", str(other), "--json", monkeypatch=monkeypatch) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["report"] == str(other)
    assert said["bytes"] == len(first) == other.stat().st_size
    assert said["proof"]["verdict"] == "warn"
    assert said["state"] == "finished"
    assert other.read_bytes() == first


def test_the_command_refuses_what_is_no_run_and_what_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lorafit("report", str(tmp_path), monkeypatch=monkeypatch) == 2
    assert "is not a run directory" in capsys.readouterr().err
    folder = write_run(tmp_path / "run")
    there = str(tmp_path / "nowhere" / "x.html")
    assert lorafit("report", str(folder), "--output", there, monkeypatch=monkeypatch) == 2
    assert "cannot write `x.html`" in capsys.readouterr().err
    with pytest.raises(RunError):
        write_report(RunDirectory.open(folder), tmp_path / "nowhere" / "x.html")
