"""The Python API: rows in memory, progress by default, errors with their place."""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from tests.tiny_models import write_model

import lorafit
from lorafit.data.memory_rows import rows_file, rows_in
from lorafit.errors import DataError

ROWS = [{"instruction": f"Say {number}.", "output": f"It is {number}."} for number in range(12)]


def config(folder: Path, data: Any) -> dict[str, Any]:
    return {
        "model": {"name": str(write_model(folder / "model")), "dtype": "float32", "device": "cpu"},
        "data": data,
        "lora": {"rank": 2},
        "train": {"max_steps": 2, "batch_size": 4},
        "run": {"output": str(folder / "run"), "verify": False, "samples": 0, "check": "warn"},
    }


def test_rows_in_memory_train_as_rows_of_a_file_and_progress_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(ROWS))
    results = [
        lorafit.train(config(tmp_path / name, data), quiet=name == "file")
        for name, data in (("list", ROWS), ("path", {"path": ROWS}), ("file", {"path": str(file)}))
    ]
    weights = {(result.adapter / "adapter_model.safetensors").read_bytes() for result in results}
    assert len(weights) == 1
    shown = capsys.readouterr().err
    assert shown.count("step 2/2") == 2  # the third is quiet


def test_the_same_rows_are_the_same_file() -> None:
    path = rows_file(ROWS)
    assert path == rows_file([dict(row) for row in ROWS])
    assert path != rows_file(ROWS[1:])
    assert [json.loads(line) for line in path.read_text().splitlines()] == ROWS
    assert path.parent.stat().st_mode & 0o077 == 0


def test_a_row_that_json_cannot_hold_is_named() -> None:
    with pytest.raises(DataError) as caught:
        rows_file([*ROWS, {"instruction": object()}])
    assert caught.value.problems[0].place == "row 13"
    with pytest.raises(DataError) as caught:
        rows_file([ROWS[0], "x.json"])  # type: ignore[list-item]
    assert caught.value.problems[0].place == "row 2"


def test_a_fault_is_named_by_its_row_and_not_by_the_file_of_the_cache(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        lorafit.train(config(tmp_path, [*ROWS, {"instruction": "no answer"}]))
    place = caught.value.problems[0].place
    assert re.fullmatch(rf"rows in memory \([0-9a-f]{{8}}\) row {len(ROWS) + 1}, .*", place)


def test_tables_and_generators_are_read_as_the_list_of_their_rows() -> None:
    pandas = pytest.importorskip("pandas")
    datasets = pytest.importorskip("datasets")
    frame = pandas.DataFrame(ROWS)
    filtered = pandas.DataFrame([{"instruction": "x"}, *ROWS])[1:]  # its index does not begin at 0
    for value in (
        tuple(ROWS),
        (row for row in ROWS),
        frame,
        filtered,
        pyarrow.Table.from_pylist(ROWS),
        datasets.Dataset.from_list(ROWS),
    ):
        rows = rows_in(value)
        assert rows is not None
        assert [{**row} for row in rows] == ROWS
    when = datetime.date(2026, 1, 2)
    dated = rows_in(pyarrow.table({"instruction": ["a"], "output": [None], "when": [when]}))
    assert dated is not None
    assert json.loads(rows_file(dated).read_text()) == {"instruction": "a", "output": None, "when": str(when)}


@pytest.mark.parametrize("value", [None, 3, "rows.json", Path("rows.json"), ["a.json", "b.json"], b"x"])
def test_names_of_files_and_settings_are_no_rows(value: object) -> None:
    assert rows_in(value) is None


@pytest.mark.parametrize(
    "value", [[], (), iter([]), iter(["a.json"]), {"train": ROWS}, {1, 2}, pyarrow.array(["a"])]
)
def test_what_holds_no_rows_is_refused_with_the_form_of_rows(tmp_path: Path, value: Any) -> None:
    with pytest.raises(DataError) as caught:
        lorafit.train(config(tmp_path, value))
    assert '[{"instruction"' in caught.value.problems[0].hint


def test_the_name_of_a_file_can_stand_for_the_section(tmp_path: Path) -> None:
    for data in (name := str(tmp_path / "none.json"), [name], {"path": name}):
        with pytest.raises(DataError, match="no such file"):
            lorafit.train(config(tmp_path / "run", data))


def test_names_and_rows_are_keywords_over_any_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[lorafit.Config] = []
    monkeypatch.setattr("lorafit.api.start_run", lambda config, quiet: started.append(config))
    file, recipe = tmp_path / "rows.json", tmp_path / "recipe.yaml"
    file.write_text(json.dumps(ROWS))
    recipe.write_text("train: {epochs: 2}\nmodel: {name: other}\n")
    keywords: dict[str, Any] = {"model": tmp_path / "base", "output": tmp_path / "run"}
    train = {"train": {"epochs": 2}}
    whole = lorafit.Config.model_validate({**train, "model": {"name": "other"}, "data": {"path": "no"}})
    for config in (train, {**train, "model": "other"}, {**train, "data": "no"}, str(recipe), recipe, whole):
        lorafit.train(config, **keywords, data=file)
    lorafit.train(train, **keywords, data=[str(file)])
    lorafit.train(
        {**train, "model": str(tmp_path / "base"), "data": file, "run": {"output": str(tmp_path / "run")}}
    )
    assert len({config.model_dump_json(exclude={"data": {"path"}}) for config in started}) == 1
    assert {config.data.path for config in started} == {(str(file),)}
    lorafit.train(**keywords, data=ROWS)
    assert started[-1].data.path == (str(rows_file(ROWS)),)
    with pytest.raises(lorafit.ConfigError, match="run"):
        lorafit.train({"run": "x"}, **keywords, data=file)


def test_a_notebook_shows_the_problems_and_no_traceback() -> None:
    """IPython shows what `_render_traceback_` returns in the place of a traceback."""
    ipython = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell()
    shown: list[str] = []
    ipython._showtraceback = lambda kind, value, lines: shown.extend(lines)
    ipython.run_cell("import lorafit; lorafit.train({'train': {'lr': 3}, 'lora': {'rnak': 3}})")
    assert "error: unknown key `train.lr`" in shown
    assert "error: unknown key `lora.rnak`" in shown
    assert not any("Traceback" in line or "lorafit/" in line for line in shown)
