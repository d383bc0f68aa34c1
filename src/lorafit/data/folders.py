"""Which files an entry of `data.path` means: a file, a folder with or without splits, a pattern, or a hub data set.

Nothing is left out in silence: every data file that is not read is named with its reason.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from lorafit.data.columns import is_row
from lorafit.data.json_rows import rows_of_object
from lorafit.data.memory_rows import name_of
from lorafit.errors import DataError, similar
from lorafit.hub.dataset_splits import (
    HUB_ID,
    KNOWN_FILES,
    ConfigurationError,
    Splits,
    configurations,
    file_kind,
    is_about,
    row_files,
    split_to_measure,
    splits_of,
    suffix_of,
)
from lorafit.storage.safe_read import MB, parse_json, read_bytes, read_json

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://?(.*)", re.IGNORECASE | re.DOTALL)
_OF_THE_HUB = re.compile(r"(?:[\w.-]*huggingface\.co/)?datasets/([\w.-]+/[\w.-]+)", re.ASCII)
_DEPTH = 4  # of folders in a folder
_MOST_FILES = 100_000
_LISTED = 5


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of `spec`, an entry of `data.path`; messages call it `name`. `revision` is a hub data set's commit.

    The rows of a `heldout` file are only measured. The rows before `first` and from `stop` on (from 0) are not read.
    """

    spec: str
    name: str
    path: Path
    revision: str
    heldout: bool = False
    first: int = 0
    stop: int | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which rows of a data set: those of `split`, None for the one to measure on, in the configuration `config`.

    `key` is the key that names the split.
    """

    split: str | None = "train"
    key: str = "data.split"
    config: str | None = None
    revision: str | None = None
    offline: bool = False


@dataclass(slots=True)
class Found:
    """The files of a spec, and for the data files that are not read: the file and the reason."""

    files: list[SourceFile] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)


def files_of(spec: str, wanted: Wanted) -> Found:
    """The files of `spec`. Raises DataError."""
    path = Path(spec).expanduser()
    try:
        exists = path.exists()
    except OSError as error:  # such as a name that is too long
        raise DataError(f"cannot be read: {error.strerror}", place=spec, hint="check the path") from None
    if not exists:
        if match := _ADDRESS.fullmatch(spec):
            raise _address(spec, match[2])
        if any(mark in spec for mark in "*?["):
            return _pattern(spec, wanted)
        if HUB_ID.fullmatch(spec) and not suffix_of(path.name):
            return _hub(spec, wanted)
    if path.is_dir():
        return _folder(spec, path, wanted)
    return Found([SourceFile(spec, name_of(path), path, "") for path in data_files(path)])


def data_files(path: Path) -> list[Path]:
    """`path` if it is a data file, or all data files directly in the folder `path`, by name. Raises DataError."""
    if not path.exists():
        raise DataError("no such file or folder", place=str(path), hint=_nearest(path))
    if path.is_dir():
        files = row_files(_listed(path)[0])
        if not files:
            raise DataError(
                "the folder holds no data files", place=str(path), hint=f"data files end in {KNOWN_FILES}"
            )
        return [path / file for file in files]
    if not suffix_of(path.name):
        hint = f"data files end in {KNOWN_FILES}"
        raise DataError(f"unsupported kind of file {path.suffix!r}", place=str(path), hint=hint)
    if not path.is_file():  # reading it would never end
        raise DataError(
            "a pipe or a device is no data file", place=str(path), hint="write the rows to a file first"
        )
    return [path]


def not_read(left_out: Iterable[tuple[str, str]]) -> str:
    """`not read: test.jsonl (split test), ...`; "" where nothing was left out."""
    listed = list(left_out)
    names = ", ".join(f"{name} ({why})" for name, why in listed[:_LISTED])
    more = f" and {len(listed) - _LISTED:,} more" if len(listed) > _LISTED else ""
    return f"not read: {names}{more}" if listed else ""


def _hub(spec: str, wanted: Wanted) -> Found:
    from lorafit.hub.client import dataset_files

    dataset = dataset_files(
        spec,
        revision=wanted.revision,
        split=wanted.split,
        config=wanted.config,
        offline=wanted.offline,
    )
    return Found([SourceFile(spec, f"{spec}/{file.name}", file, dataset.revision) for file in dataset.paths])


def _address(spec: str, rest: str) -> DataError:
    """The error for an address of the web or of a cloud store."""
    match = _OF_THE_HUB.match(rest.lstrip("/"))
    if match and (spec.lower().startswith("hf:") or "huggingface.co" in spec):
        hint = f"write {match[1]}; data.split and data.config choose a part of it"
    elif spec.lower().startswith("file:"):
        hint = f"write the path: {re.sub('^/+', '/', rest)}"
    else:
        hint = "download it first, and give the file"
    return DataError("an address is no file or folder", place=spec, hint=hint)


def _pattern(spec: str, wanted: Wanted) -> Found:
    """The files that fit a pattern such as `rows/*.jsonl`, as if they were in a folder of their own."""
    fitting = sorted(glob.glob(str(Path(spec).expanduser()), recursive=True))  # noqa: PTH207 (of any root)
    files = [path for path in map(Path, fitting) if path.is_file()]
    if not files:
        hint = f"data files end in {KNOWN_FILES}"
        raise DataError("no file fits the pattern", place=spec, hint=hint)
    root = Path(os.path.commonpath([path.parent for path in files]))
    return _chosen(spec, root, [path.relative_to(root).as_posix() for path in files], wanted)


def _folder(spec: str, root: Path, wanted: Wanted) -> Found:
    """The files of a folder: those directly in it, else, or where its card lists them, those in the folders in it."""
    files, below = _listed(root)
    if not row_files(files) or configurations(_card(root)):
        files, below = files + below, []
    found = _chosen(spec, root, files, wanted)
    found.left_out += [(file, "in a folder in it") for file in row_files(below)]
    return found


def _chosen(spec: str, root: Path, files: list[str], wanted: Wanted) -> Found:
    """Those of `files` (paths in `root`) that hold the wanted rows. Raises DataError."""
    read = row_files(files)
    left_out = [
        (file, "a text beside data files") for file in files if file_kind(file) and file not in set(read)
    ]
    if all(file_kind(file) == "text" for file in read):
        left_out += [(file, "about the others") for file in files if is_about(file)]
    strays = [file for file in read if len(read) > 1 and _is_stray(root / file)]
    left_out += [(file, "holds no rows") for file in strays]
    read = [file for file in read if file not in set(strays)]
    if not read:
        hint = f"data files end in {KNOWN_FILES}"
        found = f"; {not_read(left_out)}" if left_out else ""
        raise DataError(f"the folder holds no data files{found}", place=spec, hint=hint)
    try:
        splits = _splits(root, read, wanted.config)
    except ConfigurationError as error:
        message, hint = error.explained("the data set", wanted.config)
        raise DataError(message, place=spec, hint=hint) from None
    split = wanted.split or split_to_measure(splits)
    if split not in splits:
        hint = f"its splits: {', '.join(sorted(splits))}; {wanted.key} names one"
        raise DataError(f"the folder has no data for the split `{split}`", place=spec, hint=hint)
    split_of = {file: name for name, members in splits.items() for file in members}
    chosen = sorted(set(splits[split]))
    left_out += [
        (file, f"split {split_of[file]}" if file in split_of else "of no split")
        for file in read
        if file not in set(chosen)
    ]
    return Found([SourceFile(spec, str(root / file), root / file, "") for file in chosen], left_out)


def _splits(root: Path, files: list[str], config: str | None) -> Splits:
    """The files of each split: by `dataset_dict.json`, which `save_to_disk` writes, by the card, or by names."""
    try:
        listed = read_json(root / "dataset_dict.json", MB)["splits"]
        saved = {str(name): [file for file in files if file.startswith(f"{name}/")] for name in listed}
        if config is None and any(saved.values()):
            return saved
    except (OSError, ValueError, TypeError, LookupError):
        pass
    return splits_of(files, _card(root), config)


def _card(root: Path) -> str:
    """The text of a data set's card, "" without one."""
    try:
        return read_bytes(root / "README.md", MB).decode(errors="replace")
    except OSError:
        return ""


def _is_stray(path: Path) -> bool:
    """Whether a JSON file is one object that is no row, such as package.json."""
    if path.suffix.lower() != ".json":
        return False
    try:
        content = read_bytes(path, MB)
        value = parse_json(content) if content.lstrip()[:1] == b"{" else None
    except (OSError, ValueError):  # too large, or reading reports the fault
        return False
    if not isinstance(value, dict):
        return False
    try:
        rows = rows_of_object(value, path.name)
    except DataError:
        return True
    return rows == [value] and not is_row(value)


def _listed(root: Path) -> tuple[list[str], list[str]]:
    """The files directly in `root`, and those in the folders in it, sorted. Hidden ones are left out."""
    direct: list[str] = []
    below: list[str] = []
    for folder, names, files in os.walk(root):
        at = Path(folder).relative_to(root)
        is_deep = len(at.parts) >= _DEPTH or len(below) > _MOST_FILES
        names[:] = [] if is_deep else sorted(name for name in names if not name.startswith((".", "__")))
        kept = [(at / name).as_posix() for name in files if not name.startswith(".")]
        kept = [file for file in kept if (root / file).is_file()]
        (below if at.parts else direct).extend(kept)
    return sorted(direct), sorted(below)


def _nearest(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist either"
    near = similar(path.name, [file.name for file in folder.iterdir()], 3)
    if near:
        return f"did you mean {' or '.join(str(folder / name) for name in near)}?"
    return "check the path; a hub dataset is written owner/name"
