"""What all tests share: the files beside the project, where they are there."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from lorafit.cli.main import COLLECT

gc.set_threshold(*COLLECT)  # before torch and its friends are imported
# Busy machines are slow, not wrong. CI tries the same examples every time; elsewhere every run explores new ones.
settings.register_profile("lorafit", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("lorafit")


def shared_dir() -> Path:
    """The folder of shared models and data; skips the test where it is missing."""
    path = Path(os.environ.get("LORAFIT_SHARED") or Path(__file__).parents[2] / "shared")
    if not path.is_dir():
        pytest.skip(f"needs the shared files: {path} is missing (set LORAFIT_SHARED)")
    return path


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared models and data."""
    return shared_dir()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache for these tests alone: the user's is neither read nor written. Workers share what the compiler made."""
    folder = tmp_path_factory.mktemp("cache")
    if "PYTEST_XDIST_WORKER" in os.environ:
        of_all = tmp_path_factory.getbasetemp().parent / "native"
        of_all.mkdir(mode=0o700, exist_ok=True)
        (folder / "native").symlink_to(of_all, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAFIT_CACHE", str(folder))
        yield folder
