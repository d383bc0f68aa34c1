"""Runs of tiny models to export, and reading back without a process of its own where that is not what is tested."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import write_model, write_rows
from torch import Tensor

from lorafit.config.load import load_config
from lorafit.export import parity, readback
from lorafit.export.run_source import RunSource, open_source
from lorafit.training.run import start_run


def make_run(folder: Path, family: str = "llama", *, model: Path | None = None, **settings: Any) -> Path:
    """A run whose adapter says something else than its base; `settings` are config keys with `__` for the dot."""
    values = {
        "model.name": model or write_model(folder / "model", family),
        "data.path": write_rows(folder / "rows.json"),
        "model.dtype": "float32",
        "model.device": "cpu",
        "lora.rank": 4,
        "lora.alpha": 8,
        "train.max_steps": 3,
        "train.learning_rate": 0.05,
        "run.samples": 1,
        "run.output": folder / "run",
        **{key.replace("__", "."): value for key, value in settings.items()},
    }
    words = [f"{key}={value}" for key, value in values.items()]
    return start_run(load_config(None, words), quiet=True).path


def source_of(run: Path) -> RunSource:
    """The run as exports see it."""
    return open_source(run, offline=True)


def read_back_here(patch: pytest.MonkeyPatch) -> None:
    """Have transformers and peft read exports back in this process, which has imported them already."""
    in_child = parity._read_back

    def here(request: dict[str, Any], place: str) -> tuple[dict[str, Any], Tensor]:
        if request["reader"] == "llama.cpp":
            return in_child(request, place)
        result, logits = readback.READERS[request["reader"]].read({**request, "threads": 1})
        return result, torch.from_numpy(logits)

    patch.setattr(parity, "_read_back", here)
