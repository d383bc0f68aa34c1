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
    in_child = parity._read_back

    def here(request: dict[str, Any], place: str) -> tuple[dict[str, Any], Tensor]:
        if request["reader"] == "llama.cpp":
            return in_child(request, place)
        result, logits = readback.READERS[request["reader"]].read({**request, "threads": 1})
        return result, torch.from_numpy(logits)

    patch.setattr(parity, "_read_back", here)
