"""The folder of lorafit's cache."""

from __future__ import annotations

import os
from pathlib import Path


def cache_home() -> Path:
    """The folder of lorafit's cache: `LORAFIT_CACHE`, or `lorafit` in the user's cache folder. It may not exist."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("LORAFIT_CACHE") or Path(home) / "lorafit").expanduser()


def cache_folder(name: str) -> Path:
    """The folder `name` of lorafit's cache, created if it is missing, readable by its user only. Raises OSError."""
    folder = cache_home() / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
