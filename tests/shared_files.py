"""The models and data beside the project, for the tests that need them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def shared_dir() -> Path:
    """The folder of shared models and data; skips the test where it is missing."""
    path = Path(os.environ.get("LORAFIT_SHARED") or Path(__file__).parents[2] / "shared")
    if not path.is_dir():
        pytest.skip(f"needs the shared files: {path} is missing (set LORAFIT_SHARED)")
    return path
