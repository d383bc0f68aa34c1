"""A new kind of export is one record of EXPORTS: a toy one is written, verified and described in its card."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from tests.export.made import read_back_here
from tests.runs import run_to_export

from lorafit.cli.export import export
from lorafit.errors import LorafitError
from lorafit.export.kinds import EXPORTS, Advance, Export
from lorafit.export.readback import READERS
from lorafit.export.run import export_run
from lorafit.export.run_source import RunSource


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_to_export(tmp_path_factory.mktemp("kinds"))


def test_the_command_line_has_the_names_of_the_exports() -> None:
    kind = get_args(get_type_hints(export, include_extras=True)["kind"])[0]
    assert get_args(kind) == tuple(EXPORTS)
    assert {record.reader for record in EXPORTS.values()} == set(READERS)


def write_toy(source: RunSource, staging: Path, type_name: str, advance: Advance) -> Mapping[str, str]:
    sums = EXPORTS["merged"].write(source, staging, type_name, advance)
    (staging / "toy.txt").write_text("a file of its own")
    return sums


TOY: Export = dataclasses.replace(
    EXPORTS["merged"],
    title="toy",
    types=("bf16", "f32"),
    write=write_toy,
    usage="Play with {name} on {base}.",
    faults=lambda source, prompts, folder: [] if (folder / "toy.txt").is_file() else ["the toy is missing"],
)


def test_a_toy_export_is_written_verified_and_described(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_back_here(monkeypatch)
    monkeypatch.setitem(EXPORTS, "toy", TOY)
    done = export_run(run, "toy", output=tmp_path / "out", offline=True)
    assert done.type == "bf16"
    assert done.parity["verified"]
    assert done.parity["program"].startswith("transformers")
    assert "toy.txt" in done.files
    text = (done.path / "README.md").read_text()
    assert "A toy (bf16) of `model`" in text
    assert "Play with run on `model`." in text


def test_a_fault_of_a_toy_export_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_back_here(monkeypatch)
    monkeypatch.setitem(EXPORTS, "toy", dataclasses.replace(TOY, write=EXPORTS["merged"].write))
    with pytest.raises(LorafitError, match="the toy is missing"):
        export_run(run, "toy", output=tmp_path / "out", offline=True)
    assert not (tmp_path / "out").exists()
