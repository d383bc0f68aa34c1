"""The folder that an export is written to: new, empty, or an earlier export in which nothing is another's."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorafit.errors import Problem, RunError
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import (
    MANIFEST,
    MAX_MANIFEST,
    make_folder,
    make_subfolder,
    refuse_while_written,
    run_error,
    sha256_file,
)
from lorafit.storage.safe_read import read_json

_HINT = "move what is yours to another place, or give another --output"


def target_folder(run: RunDirectory, name: str, output: str | Path | None) -> Path:
    """The folder for the export `name` of `run`; its parent exists. Raises RunError as `refuse_foreign` does."""
    folder = run.exports / name if output is None else Path(os.path.realpath(Path(output).expanduser()))
    refuse_while_written(folder)
    refuse_foreign(folder)
    _refuse_changed(folder)
    with run_error("cannot make the folder", folder.parent):
        make_subfolder(folder.parent) if output is None else make_folder(folder.parent)
    return folder


def refuse_foreign(folder: Path) -> None:
    """Raise RunError naming what is in `folder`, where that is not an earlier export with its own files alone."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if (listed := _listed(folder)) is None:
        hint = "give an --output that does not exist yet"
        raise RunError("it is not empty, and no export", place=str(folder), hint=hint)
    if foreign := sorted(_foreign(folder, "", {MANIFEST, *listed})):
        names = ", ".join(f"`{name}`" for name in foreign[:8]) + (" ..." if len(foreign) > 8 else "")
        raise RunError(f"it holds what lorafit did not write: {names}", place=str(folder), hint=_HINT)


def _refuse_changed(folder: Path) -> None:
    """Raise RunError naming the files of an earlier export that are not as they were written."""
    changed = []
    with run_error("cannot be read", folder):
        for name, entry in sorted((_listed(folder) or {}).items()):
            path = folder / name
            if path.exists() and (
                path.stat().st_size != entry["size"] or sha256_file(path) != entry["sha256"]
            ):
                changed.append(Problem(f"`{name}` has changed since it was exported", str(folder), _HINT))
    if changed:
        raise RunError.of(changed)


def _listed(folder: Path) -> Mapping[str, Any] | None:
    """The files of the export in `folder`, by name; None where it is no export."""
    try:
        manifest = read_json(folder / MANIFEST, MAX_MANIFEST)
        files = {
            name: {"size": file["size"], "sha256": file["sha256"]} for name, file in manifest["files"].items()
        }
        return files if "export" in manifest["facts"] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _foreign(folder: Path, prefix: str, listed: set[str]) -> Iterator[str]:
    """What is in `folder` and is not `listed`; a folder with nothing that is listed counts as one."""
    for path in folder.iterdir():
        name = prefix + path.name
        if path.is_dir() and not path.is_symlink() and any(one.startswith(f"{name}/") for one in listed):
            yield from _foreign(path, f"{name}/", listed)
        elif name not in listed or not path.is_file() or path.is_symlink():
            yield name
