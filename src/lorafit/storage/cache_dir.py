"""The folder of lorafit's cache."""

from __future__ import annotations

import os
from pathlib import Path

from lorafit.storage.ownership import not_own, not_safe_above


def cache_home() -> Path:
    """The folder of lorafit's cache: `LORAFIT_CACHE`, or `lorafit` in the user's cache folder. It may not exist."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("LORAFIT_CACHE") or Path(home) / "lorafit").expanduser()


def cache_folder(name: str) -> Path:
    """The folder `name` of lorafit's cache, created if it is missing, readable by its user only.

    Raises OSError, also where another user made it or can write to it.
    """
    cache = cache_home()
    for folder in (cache, cache / name):
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        if reason := not_own(folder):
            raise OSError(f"the cache `{folder}` {reason}: set LORAFIT_CACHE to a folder of your own")
    if reason := not_safe_above(cache):
        raise OSError(f"the cache is not safe, because {reason}: set LORAFIT_CACHE to a folder of your own")
    return cache / name
