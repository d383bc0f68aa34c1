"""A run as exports see it, and reading back without a process of its own where that is not what is tested."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lorafit.export import parity, readback
from lorafit.export.run_source import RunSource, open_source


def source_of(run: Path) -> RunSource:
    """The run as exports see it."""
    return open_source(run, offline=True)


def read_back_here(patch: pytest.MonkeyPatch) -> None:
    """Have transformers and peft read exports back in this process, which has imported them already."""
    in_child = parity._read_back

    def here(request: dict[str, Any]) -> tuple[dict[str, Any], NDArray[np.float32]]:
        if request["kind"] in ("merged", "adapter"):
            return readback._by_transformers({**request, "threads": 1})
        return in_child(request)

    patch.setattr(parity, "_read_back", here)
