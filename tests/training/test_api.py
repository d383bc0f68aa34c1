"""The Python API: rows in memory, progress by default, errors with their place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_models import write_model

import lorafit
from lorafit.data.memory_rows import rows_file
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
    with pytest.raises(DataError, match="empty"):
        rows_file([])
