"""A run as exports see it, and reading back without a process of its own where that is not what is tested."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorafit.export import parity, readback
from lorafit.export.run_source import RunSource, open_source


def source_of(run: Path) -> RunSource:
    """The run as exports see it."""
    return open_source(run, offline=True)


def read_back_here(patch: pytest.MonkeyPatch) -> None:
    """Have transformers and peft read exports back in this process, which has imported them already."""
    in_child = parity._in_process
    patch.setattr(readback, "_report", lambda done, total: None)

    def here(request: dict[str, Any], place: str, advance: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if request["reader"] == "llama.cpp":
            return in_child(request, place, advance)
        result, scores = readback.READERS[request["reader"]].read({**request, "threads": 1})
        return result, {name: torch.from_numpy(numbers) for name, numbers in scores.items()}

    patch.setattr(parity, "_in_process", here)
