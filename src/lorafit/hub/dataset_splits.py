"""Which files hold rows: their kinds, and the split of a hub data set by its card, else by the files' names."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

import yaml

# Kind of the data files by suffix, here and on the hub.
FILE_KINDS = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".ndjson.gz"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    ".parquet": "parquet",
    **dict.fromkeys((".arrow", ".feather"), "arrow"),
}
_PREFERRED = ("parquet", "arrow", "json", "csv")  # where two kinds have as many files, the first is read
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
MAX_HEADER = 100_000  # characters of a card's YAML
MAX_WILDCARDS = 8  # of a pattern: matching takes its time for each
# Files that libraries write beside the rows.
METADATA = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


class ManyConfigurationsError(ValueError):
    """The card names several configurations, in the message, and none is the default."""


def suffix_of(name: str) -> str:
    """The suffix of a data file by its name without folders, "" for any other file."""
    lowered = name.lower()
    return next((s for s in FILE_KINDS if lowered.endswith(s) and not lowered.startswith(".")), "")


def file_kind(file: str) -> str | None:
    """The kind of a file of the hub, None for one that is not a data file."""
    path = PurePosixPath(file)
    if path.name in METADATA or any(part.startswith((".", "__")) for part in path.parts):
        return None
    return FILE_KINDS.get(suffix_of(path.name))


def of_one_kind(files: list[str]) -> list[str]:
    """The files of the most frequent kind, by name: a second kind may hold the same rows again."""
    kinds = [file_kind(file) for file in files]
    chosen = max(_PREFERRED, key=kinds.count)
    return sorted(file for file in files if file_kind(file) == chosen)


def splits_of_names(files: list[str]) -> dict[str, list[str]]:
    """The splits by words in the files' paths; all files are `train` where no path has such a word."""
    splits: dict[str, list[str]] = {}
    for file in files:
        sharded = re.fullmatch(r"data/([^/]+?)-\d{5}-of-\d{5}[^/]*", file)
        words = re.split(r"[-._ 0-9/]+", file.lower())
        named = [sharded[1]] if sharded else [SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS]
        if named:
            splits.setdefault(named[-1], []).append(file)
    return splits or ({"train": files} if files else {})


def splits_of_card(card: str, files: list[str]) -> dict[str, list[str]]:
    """The splits of the default configuration in the YAML header of the dataset card, {} without one."""
    header = re.match(r"---\s*\n(.*?)\n---\s*$", card, re.DOTALL | re.MULTILINE)
    try:
        fields = yaml.safe_load(header[1]) if header and len(header[1]) <= MAX_HEADER else None
    except (yaml.YAMLError, ValueError, TypeError, LookupError, RecursionError):
        return {}
    listed = fields.get("configs") if isinstance(fields, dict) else None
    configs = [config for config in listed if isinstance(config, dict)] if isinstance(listed, list) else []
    if not configs:
        return {}
    default = [c for c in configs if c.get("default") is True or c.get("config_name") == "default"] or configs
    if len(default) > 1:
        raise ManyConfigurationsError(", ".join(str(config.get("config_name")) for config in configs))
    folder = str(default[0].get("data_dir") or "").strip("./")
    files = [file for file in files if file.startswith(folder + "/")] if folder else files
    patterns = _split_patterns(default[0].get("data_files"))
    if not patterns:
        return splits_of_names(files)
    splits = {
        split: [
            file
            for file in files
            if any(_glob(f"{folder}/{glob}" if folder else glob, file) for glob in globs)
        ]
        for split, globs in patterns.items()
    }
    return {split: matching for split, matching in splits.items() if matching}


def _split_patterns(data_files: object) -> dict[str, list[str]]:
    """The glob patterns of each split, from any form of `data_files` in a dataset card."""
    match data_files:
        case str():
            return {"train": [data_files]}
        case dict():
            return {str(split): _texts(paths) for split, paths in data_files.items()}
        case [dict(), *_]:
            entries = [entry for entry in data_files if isinstance(entry, dict)]
            return {str(entry.get("split", "train")): _texts(entry.get("path")) for entry in entries}
        case _:
            return {"train": _texts(data_files)} if data_files else {}


def _texts(value: object) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def _glob(pattern: str, path: str) -> bool:
    """Whether `path` matches: `*` and `?` stay within a folder, `**` does not."""
    if pattern.count("*") > MAX_WILDCARDS:
        return False
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?)", pattern.removeprefix("./"))
    return re.fullmatch("".join(wild.get(piece) or re.escape(piece) for piece in pieces), path) is not None
