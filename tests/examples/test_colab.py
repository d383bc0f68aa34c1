"""The notebook is a valid one without outputs, and runs from top to bottom with a small model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

import lorafit
from lorafit.storage.atomic import verify_folder

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "colab.ipynb"
# nbclient in a process of its own: jupyter's packages warn about each other, and here warnings are errors
RUN = """
import sys, nbformat, nbclient
notebook = nbformat.read(sys.argv[1], 4)
nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[1])
"""


def cells() -> list[Any]:
    return list(nbformat.read(NOTEBOOK, 4).cells)


def test_it_is_valid_and_holds_no_outputs() -> None:
    nbformat.validate(json.loads(NOTEBOOK.read_text(encoding="utf-8")))
    assert all(
        not cell.outputs and cell.execution_count is None for cell in cells() if cell.cell_type == "code"
    )
    assert len({cell.id for cell in cells()}) == len(cells())


def test_it_shows_the_whole_way() -> None:
    source = "\n".join(cell.source for cell in cells() if cell.cell_type == "code")
    for verb in ("check", "train", "generate", "chat", "export"):
        assert f"lorafit {verb} " in source


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path: Path) -> None:
    for name in ("gguf", "nbclient", "ipykernel"):
        pytest.importorskip(name)
    shutil.copytree(ROOT / "demo", tmp_path / "demo")
    copy = shutil.copy(NOTEBOOK, tmp_path / "colab.ipynb")
    settings = {
        "SOURCE": "",
        "MODEL": "demo/model",
        "DATA": "demo/rows.json",
        "RECIPE": "demo/recipe.yaml",
        "SETTINGS": "train.max_steps=60 train.eval_every=30 train.save_every=30 run.offline=true",
        "QUESTION": "What does a goat eat?",
        "RUN": "runs/colab",
    }
    environment = {
        **os.environ,
        **{f"LORAFIT_{name}": value for name, value in settings.items()},
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(Path(lorafit.__file__).parents[1]),
        "PYTHONWARNINGS": "ignore",
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "JUPYTER_PLATFORM_DIRS": "1",
    }
    words = [sys.executable, "-c", RUN, str(copy)]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said = {
        cell.source: "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
        for cell in nbformat.read(copy, 4).cells
        if cell.cell_type == "code"
    }
    assert not [text for text in said.values() if "error:" in text], said
    answers = [text for source, text in said.items() if "lorafit.generate" in source]
    assert answers == ["A goat eats leaves.\n"]
    run = tmp_path / "runs" / "colab"
    assert verify_folder(run / "adapter") == []
    (model,) = run.glob("gguf/*.gguf")
    assert model.read_bytes()[:4] == b"GGUF"
