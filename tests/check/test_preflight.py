"""Stored findings: the same results without reading a row, and a miss for everything that decides them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_models import write_model, write_rows

from lorafit.check import preflight
from lorafit.check.run import check_rows, check_texts
from lorafit.config.load import load_config
from lorafit.data import token_cache
from lorafit.data.build import build_data
from lorafit.data.sources import RowReader
from lorafit.errors import CheckResult
from lorafit.hub.client import model_folder
from lorafit.model.architecture import read_architecture


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("preflight") / "model")


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a row of every fault that only the text shows, and a cache of its own."""
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))
    path = write_rows(tmp_path / "rows.json", 60)
    rows = json.loads(path.read_text())
    for number, answer in (
        (3, "N/A"),
        (4, "caf\u00c3\u00a9 \x1b \ufffd"),
        (5, "That is all.</s>"),
        (6, "  "),
    ):
        rows[number]["output"] = answer
    rows[8] = rows[7]
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each reading of the rows by the checks."""
    counted: list[int] = []

    inspect = preflight.inspect

    def counting(*args: Any) -> preflight.RowFindings:
        counted.append(1)
        return inspect(*args)

    monkeypatch.setattr(preflight, "inspect", counting)
    return counted


def check(model: Path, path: Path, *overrides: str) -> list[CheckResult]:
    words = [f"model.name={model}", f"data.path={path}", "data.holdout=5", "train.max_steps=2", *overrides]
    config = load_config(None, [*words, "run.check=warn"])
    training_data = build_data(config, model_folder(str(model)), read_architecture(model), quiet=True)
    return check_rows(config, training_data, 1000, quiet=True)


def test_the_second_start_gives_the_same_results_without_reading_a_row(
    model: Path, rows: Path, reads: list[int]
) -> None:
    first = check(model, rows)
    assert {result.name for result in first if result.verdict == "warn"} >= {
        "dropped rows", "answers", "duplicates", "encoding", "control tokens",
    }  # fmt: skip
    assert len(reads) == 1
    assert check(model, rows) == first
    assert len(reads) == 1
    moved = check(model, Path(shutil.copy(rows, rows.with_name("other.json"))))
    assert len(reads) == 1
    assert [result.place.replace("other.json", "rows.json") for result in moved] == [r.place for r in first]


@pytest.mark.parametrize(
    "override", ["train.seed=7", "data.holdout=3", "data.max_length=700", "data.train_on=all"]
)
def test_another_split_or_other_tokens_miss(model: Path, rows: Path, reads: list[int], override: str) -> None:
    check(model, rows)
    stored = check(model, rows, override)
    assert len(reads) == 2
    shutil.rmtree(rows.parent / "cache")
    assert check(model, rows, override) == stored


def test_a_changed_file_another_bound_and_other_checks_miss(
    model: Path, rows: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = check(model, rows)
    rows.write_bytes(rows.read_bytes().replace(b"N/A", b"n/a"))
    assert check(model, rows) != first
    assert len(reads) == 2
    for count, (module, name, value) in enumerate(
        [(preflight, "CHECKS", preflight.CHECKS + 1), (preflight, "__version__", "0")], start=3
    ):
        monkeypatch.setattr(module, name, value)
        check(model, rows)
        assert len(reads) == count
    monkeypatch.setattr("lorafit.check.run.MOST_ROWS", 20)
    monkeypatch.setattr(RowReader.chunks, "__defaults__", (16,))
    (account,) = [result for result in check(model, rows) if result.name == "rows"]
    assert "the first 32 checked" in account.message
    assert len(reads) == count + 1


def _flip(folder: Path) -> None:
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"count": 1', '"count": 2', 1))


def _foreign(folder: Path) -> None:
    shutil.rmtree(folder)
    token_cache.store_facts(folder.name, {"texts": {"num_rows": "many"}, "tokens": 3})


def _beyond(folder: Path) -> None:
    facts = token_cache.load_facts(folder.name)
    assert facts is not None
    facts["texts"]["empty"]["rows"] = [10**9]
    shutil.rmtree(folder)
    token_cache.store_facts(folder.name, facts)


@pytest.mark.parametrize(
    "change", [_flip, _foreign, _beyond, lambda folder: (folder / "manifest.json").unlink()]
)
def test_damaged_and_foreign_findings_are_found_anew(
    model: Path, rows: Path, reads: list[int], change: Callable[[Path], None]
) -> None:
    first = check(model, rows)
    entries = (rows.parent / "cache" / "rows").iterdir()
    (folder,) = [entry for entry in entries if not (entry / "tokens.bin").exists()]
    change(folder)
    assert check(model, rows) == first
    assert len(reads) == 2
    assert check(model, rows) == first
    assert len(reads) == 2


def test_without_a_model_rows_are_left_out_and_leaks_named_too(tmp_path: Path) -> None:
    rows = [{"instruction": f"say {n}", "output": f"it is {n}" if n != 3 else None} for n in range(12)]
    lines = [json.dumps(row) + "\n" for row in rows]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    (tmp_path / "own.jsonl").write_text("".join(lines[10:]))
    words = [f"data.path={tmp_path / 'train.jsonl'}", f"data.eval_path={tmp_path / 'own.jsonl'}"]
    checked = check_texts(load_config(None, ["model.name=none", *words, "data.bad_rows=drop"]), quiet=True)
    said = {verdict.name: verdict for verdict in checked.verdicts}
    assert (said["dropped rows"].message, said["dropped rows"].rows) == (
        "1 row dropped: `output` is null",
        (4,),
    )
    assert said["leaks"].message == "2 of 2 held-out rows also trained"
