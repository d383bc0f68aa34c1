"""Which files hold rows: their kinds, and the split of a data set by its card, else by the files' names."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

import yaml

from lorafit.redact import shell

PACKED = (".gz", ".zst")  # a text file may also be packed in one of these
_TEXT_KINDS = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((".txt", ".md"), "text"),
}
# Kind of the data files by suffix, here and on the hub.
FILE_KINDS = {
    **_TEXT_KINDS,
    **{suffix + packed: kind for suffix, kind in _TEXT_KINDS.items() for packed in PACKED},
    ".parquet": "parquet",
    **dict.fromkeys((".arrow", ".feather"), "arrow"),
}
KNOWN_FILES = f"{' '.join(_TEXT_KINDS)} (also {' '.join(PACKED)}), .parquet .arrow .feather"
_PREFERRED = ("parquet", "arrow", "json", "csv")  # where two kinds have as many files, the first is read
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
MAX_HEADER = 100_000  # characters of a card's YAML
MAX_WILDCARDS = 8  # of a pattern: matching takes its time for each
# Files that libraries write beside the rows, and texts about a data set or a project.
METADATA = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_ABOUT = re.compile(r"(readme|licen[cs]e|changelog|contributing|requirements[^.]*)(\..*)?", re.IGNORECASE)
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
Splits = dict[str, list[str]]


class ConfigurationError(ValueError):
    """The card has no configuration of the wanted name, or several and no default one: `names` are all."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(", ".join(names))
        self.names = names

    def explained(self, what: str, config: str | None) -> tuple[str, str]:
        """(message, hint) for the data set `what` when `config` was wanted."""
        if not self.names:
            return f"{what} names no configurations", "leave data.config out"
        hint = shell(f"data.config={self.names[0]}") + (" or another one" if len(self.names) > 1 else "")
        if config is None:
            return f"{what} has several configurations and no default one: {self}", hint
        return f"{what} has no configuration `{config}`; it has {self}", hint


def suffix_of(name: str) -> str:
    """The suffix of a data file by its name without folders, "" for any other file."""
    lowered = name.lower()
    return next((s for s in FILE_KINDS if lowered.endswith(s) and not lowered.startswith(".")), "")


def file_kind(file: str) -> str | None:
    """The kind of a file of a data set, None for one that is not a data file."""
    path = PurePosixPath(file)
    if path.name in METADATA or any(part.startswith((".", "__")) for part in path.parts):
        return None
    kind = FILE_KINDS.get(suffix_of(path.name))
    is_cache = kind == "arrow" and path.name.startswith("cache-")  # what `datasets` computed from the rows
    return None if is_cache or is_about(file) else kind


def is_about(file: str) -> bool:
    """Whether a file is a text about a data set or a project, such as README.md."""
    name = PurePosixPath(file).name
    return FILE_KINDS.get(suffix_of(name)) == "text" and _ABOUT.fullmatch(name) is not None


def row_files(files: list[str]) -> list[str]:
    """The data files among `files`. Texts count only where there are no other data files: they tell about those."""
    kinds = {file: kind for file in files if (kind := file_kind(file))}
    return [file for file in kinds if kinds[file] != "text" or set(kinds.values()) == {"text"}]


def of_one_kind(files: list[str]) -> list[str]:
    """The files of the most frequent kind, by name: a second kind may hold the same rows again."""
    kinds = [file_kind(file) for file in files]
    chosen = max((*_PREFERRED, "text"), key=kinds.count)
    return sorted(file for file in files if file_kind(file) == chosen)


def splits_of(files: list[str], card: str, config: str | None = None) -> Splits:
    """The data files of each split, by the configuration `config` of the card, else by the files' names.

    Raises ConfigurationError.
    """
    return _splits_of_card(card, files, config) or splits_of_names(files)


def splits_of_names(files: list[str]) -> Splits:
    """The splits by words in the files' paths; all files are `train` where no path has such a word.

    Where only validation and test files are named, the files without a word are `train`. A word in the name of a text
    counts only if all names have one: it may be a title.
    """
    splits: Splits = {}
    unnamed = []
    for file in files:
        sharded = re.fullmatch(r"data/([^/]+?)-\d{5}-of-\d{5}[^/]*", file)
        words = re.split(r"[-._ 0-9/]+", file.lower())
        named = [sharded[1]] if sharded else [SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS]
        if named:
            splits.setdefault(named[-1], []).append(file)
        else:
            unnamed.append(file)
    are_titles = unnamed and all(file_kind(file) == "text" for file in files)
    if unnamed and (are_titles or not splits):
        return {"train": files}
    if unnamed and splits.keys() <= {"validation", "test"}:
        splits["train"] = unnamed
    return splits


def split_to_measure(splits: Splits) -> str:
    """The split to measure a loss on where none is named: `validation`, else `test`, else the only one."""
    known = [name for name in ("validation", "test") if name in splits] or (
        splits if len(splits) == 1 else []
    )
    return next(iter(known), "validation")


def _splits_of_card(card: str, files: list[str], config: str | None) -> Splits:
    """The splits of a configuration in the YAML header of the card, {} where it names none."""
    configs = configurations(card)
    names = [_text(entry.get("config_name", "default")) for entry in configs]
    if config is not None:
        chosen = [entry for entry, name in zip(configs, names, strict=True) if name == config]
    else:
        chosen = [
            e for e in configs if e.get("default") is True or e.get("config_name") == "default"
        ] or configs
    if len(chosen) > 1 or (config is not None and not chosen):
        raise ConfigurationError(names)
    if not chosen:
        return {}
    folder = _text(chosen[0].get("data_dir") or "").strip("./")
    files = [file for file in files if file.startswith(folder + "/")] if folder else files
    patterns = _split_patterns(chosen[0].get("data_files"))
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


def configurations(card: str) -> list[dict[str, object]]:
    """The entries of `configs` in the YAML header of a card."""
    header = re.match(r"---\s*\n(.*?)\n---\s*$", card, re.DOTALL | re.MULTILINE)
    try:
        fields = yaml.safe_load(header[1]) if header and len(header[1]) <= MAX_HEADER else None
    except (yaml.YAMLError, ValueError, TypeError, LookupError, RecursionError):
        return []
    listed = fields.get("configs") if isinstance(fields, dict) else None
    return [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []


def _split_patterns(data_files: object) -> dict[str, list[str]]:
    """The glob patterns of each split, from any form of `data_files` in a dataset card."""
    match data_files:
        case str():
            return {"train": [data_files]}
        case dict():
            return {_text(split): _texts(paths) for split, paths in data_files.items()}
        case [dict(), *_]:
            entries = [entry for entry in data_files if isinstance(entry, dict)]
            return {_text(entry.get("split", "train")): _texts(entry.get("path")) for entry in entries}
        case _:
            return {"train": _texts(data_files)} if data_files else {}


def _texts(value: object) -> list[str]:
    return [_text(item) for item in value] if isinstance(value, list) else [_text(value)]


def _text(value: object) -> str:
    """A name or pattern of a card, "" for what is none: a list of aliases of lists would become a text without end."""
    return str(value) if isinstance(value, str | int | float) else ""


def _glob(pattern: str, path: str) -> bool:
    """Whether `path` matches: `*` and `?` stay within a folder, `**` does not."""
    if pattern.count("*") > MAX_WILDCARDS:
        return False
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?)", pattern.removeprefix("./"))
    return re.fullmatch("".join(wild.get(piece) or re.escape(piece) for piece in pieces), path) is not None
