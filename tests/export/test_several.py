"""Several adapters in one folder of GGUF-LoRAs: each is named, read back, and of one base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.command import Cli
from tests.runs import run_to_export
from tests.tiny_gguf import write_gguf_model

from lorafit.errors import ConfigError
from lorafit.export.run import export_run

SHORT = ("train.max_steps=1", "run.samples=0")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf_model(tmp_path_factory.mktemp("base") / "base.gguf", "llama")


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs on one file, `polite` and `brief`."""
    made = []
    for name in ("polite", "brief"):
        folder = tmp_path_factory.mktemp(name)
        run = run_to_export(folder, *SHORT, f"train.seed={len(made)}", model=base)
        made.append(run.rename(folder / name))
    return made[0], made[1]


def test_the_folder_has_each_adapter_by_its_name(runs: tuple[Path, Path], tmp_path: Path, cli: Cli) -> None:
    done = cli("export", runs[0], "gguf-lora", "--with", runs[1], "--output", tmp_path / "out", "--no-verify")
    assert done.code == 0
    files = {path.name for path in (tmp_path / "out").glob("*.gguf")}
    assert files == {"polite-lora.gguf", "brief-lora.gguf"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--lora polite-lora.gguf --lora brief-lora.gguf --lora-init-without-apply" in card
    assert "- 1: `brief-lora.gguf`" in card


@pytest.mark.slow
def test_each_adapter_is_read_back(runs: tuple[Path, Path], tmp_path: Path) -> None:
    done = export_run(runs[0], "gguf-lora", others=[runs[1]], output=tmp_path / "out", offline=True)
    parity = json.loads((done.path / "parity.json").read_text())
    assert parity["verified"]
    assert parity["others"]["brief"]["verified"]
    assert parity["others"]["brief"]["adapter_loss"] != parity["adapter_loss"]


def test_all_that_does_not_fit_is_named(runs: tuple[Path, Path], base: Path, tmp_path: Path) -> None:
    for name in ("a", "c"):
        (tmp_path / name).mkdir()
    elsewhere = run_to_export(tmp_path / "a", *SHORT, model=write_gguf_model(tmp_path / "b.gguf", seed=1))
    asked = run_to_export(tmp_path / "c", *SHORT, "data.system=Be brief.", model=base)
    twin = shutil.copytree(runs[0], tmp_path / "polite")
    others = [elsewhere.rename(tmp_path / "other"), asked.rename(tmp_path / "asked"), twin]
    with pytest.raises(ConfigError) as caught:
        export_run(runs[0], "gguf-lora", others=others, output=tmp_path / "out", offline=True)
    said = [problem.message for problem in caught.value.problems]
    assert len(said) == 3
    assert "another base" in said[0]
    assert "another template" in said[1]
    assert "is named `polite` too" in said[2]
    assert not (tmp_path / "out").exists()


def test_other_kinds_have_one_adapter(runs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has one adapter"):
        export_run(runs[0], "adapter", others=[runs[1]], output=tmp_path / "out", offline=True)
