"""Files from the Hugging Face hub: models, adapters and datasets, pinned to a commit and cached.

Only the files that the program reads are fetched, by name: never pickled weights, never code.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import httpx
import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    LocalEntryNotFoundError,
)
from huggingface_hub.utils.tqdm import disable_progress_bars

from lorafit.errors import ConfigError, LorafitError, ModelError, several
from lorafit.gguf_file.folder import gguf_model_folder
from lorafit.gguf_file.header import is_gguf
from lorafit.hub.answers import AnswerError, check_commit, check_files, is_revision, watch_answers
from lorafit.hub.dataset_splits import (
    HUB_ID,
    KNOWN_FILES,
    ConfigurationError,
    of_one_kind,
    row_files,
    split_to_measure,
    splits_of,
)
from lorafit.hub.errors import MORE_SPACE, TOKENS_PAGE, Repository, explained, similar_folder
from lorafit.hub.waits import interruptible, watched_waits
from lorafit.observe.progress import progress
from lorafit.redact import dotenv, logger_of, one_line
from lorafit.storage.atomic import existing

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "adapter_config.json",
    "prompt.json",
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt")

_WHAT_TO_GIVE = (
    "give a folder with safetensors weights, a GGUF file, or a hub id (owner/name; see `lorafit models`)"
)

logger = logger_of(__name__)


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model or adapter on the local disk; `revision` is the hub's commit, None for a local folder."""

    path: Path
    name: str
    revision: str | None


@dataclass(frozen=True, slots=True)
class DatasetFiles:
    """The data files of one split of a hub dataset, in the order of their names, and their commit."""

    paths: list[Path]
    revision: str


def model_folder(
    name: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    validate: Callable[[Path], object] = lambda folder: None,
) -> ModelFolder:
    """The folder of the model `name`: a local folder or GGUF file, or a hub id `owner/name`, downloaded if needed.

    `revision` is a branch, tag or commit of the hub's repository. With `offline` (or HF_HUB_OFFLINE=1) only files of
    the cache are used and no connection is opened. Before weights are downloaded, `validate` gets the folder with all
    other files, and raises where the model cannot be used. Raises ModelError.
    """
    return _gguf(name, revision) or _folder(name, revision, offline, _model_files, validate)


def tokenizer_folder(name: str, *, revision: str | None = None, offline: bool = False) -> ModelFolder:
    """As `model_folder`, but without weights: the folder of the model's tokenizer."""
    return _gguf(name, revision) or _folder(name, revision, offline, _tokenizer_files)


def adapter_folder(name: str, *, revision: str | None = None, offline: bool = False) -> ModelFolder:
    """As `model_folder`, for a PEFT adapter."""
    return _folder(name, revision, offline, _adapter_files)


def dataset_files(
    name: str,
    *,
    revision: str | None = None,
    split: str | None = "train",
    config: str | None = None,
    offline: bool = False,
) -> DatasetFiles:
    """The data files of `split` of the hub dataset `name` (`owner/name`), downloaded if needed.

    The dataset card says which files these are, by its configuration `config`, else the files' names, by the rules
    of the `datasets` library. Without a `split`, it is the one to measure on: `validation`, else `test`. A dataset's
    script is never fetched. Raises DataError.
    """
    repository = Repository("dataset", name, revision)
    listing = _list(repository, offline)
    card = ""
    if "README.md" in listing.files:
        card = (_fetch(listing, ["README.md"]) / "README.md").read_text(encoding="utf-8", errors="replace")
    try:
        splits = splits_of(row_files(listing.files), card, config)
    except ConfigurationError as error:
        raise repository.error(*error.explained(f"`{name}`", config)) from None
    split = split or split_to_measure(splits)
    if split not in splits:
        found = f"its splits: {', '.join(sorted(splits))}" if splits else f"it has no files {KNOWN_FILES}"
        raise repository.error(f"`{name}` has no data for the split `{split}`", hint=found)
    files = of_one_kind(splits[split])
    folder = _fetch(listing, files)
    return DatasetFiles([folder / file for file in files], folder.name)


def token() -> str | None:
    """The user's hub token: HF_TOKEN in the environment, else in a `.env` file here, else the stored login.

    Raises ConfigError, which does not show the token, for one that cannot be sent.
    """
    value = os.environ.get("HF_TOKEN", "").strip() or dotenv().get("HF_TOKEN") or huggingface_hub.get_token()
    if value and not re.fullmatch(r"[!-~]+", value):
        raise ConfigError(
            "HF_TOKEN is not a token: it has spaces or characters outside ASCII in it",
            hint=f"copy it again from {TOKENS_PAGE}",
        )
    return value


@dataclass(frozen=True, slots=True)
class _Listing:
    """The files of a repository at a commit; `cached` is their folder where nothing may be downloaded.

    `sizes` are the bytes of the files, where the hub gives them.
    """

    repository: Repository
    files: list[str]
    commit: str
    cached: Path | None
    sizes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with explained(self.repository):
            check_commit(self.commit)
            check_files(self.files)

    def lacks(self, file: str) -> bool:
        """Whether `file` is not in the cache yet."""
        repository = self.repository
        found = huggingface_hub.try_to_load_from_cache(
            repository.name, file, repo_type=repository.kind, revision=self.commit
        )
        return not isinstance(found, str)


def _gguf(name: str, revision: str | None) -> ModelFolder | None:
    """The folder of a model in a GGUF file; None if `name` is no such file."""
    path = Path(name).expanduser()
    if not is_gguf(path):
        return None
    if revision is not None:
        raise _no_revision(path, revision)
    return ModelFolder(gguf_model_folder(path), name, None)


def _no_revision(path: Path, revision: str) -> ModelError:
    what = "folder" if path.is_dir() else "file"
    return ModelError(
        f"a local {what} has no revision `{revision}`",
        place=str(path),
        hint="leave the revision out, or give a model of the hub (owner/name)",
    )


def _folder(
    name: str,
    revision: str | None,
    offline: bool,
    choose: Callable[[list[str], str], list[str]],
    validate: Callable[[Path], object] = lambda folder: None,
) -> ModelFolder:
    """The local folder or hub download `name`; `choose` returns the files to read, or raises ModelError."""
    path = Path(name).expanduser()
    if os.path.isfile(path):  # noqa: PTH113  does not raise for a name that is too long
        raise ModelError(f"`{name}` is a file, and not a folder", hint=_WHAT_TO_GIVE)
    if os.path.isdir(path):  # noqa: PTH112
        if revision is not None:
            raise _no_revision(path, revision)
        choose([file.name for file in path.iterdir()], str(path))
        return ModelFolder(path, name, None)
    if "://" in name:
        found = re.search(r"://(?:[^/]*\.[^/]*/)?([\w.-]+/[\w.-]+)", name, re.ASCII)
        hint = f"write its id on the hub: {found[1]}" if found else _WHAT_TO_GIVE
        raise ModelError(f"`{name}` is an address, and not a model", hint=hint)
    if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1:
        raise ModelError(f"there is no folder `{name}`", hint=similar_folder(name) or _WHAT_TO_GIVE)
    listing = _list(Repository("model", name, revision), offline)
    files = choose(listing.files, listing.repository.place)
    weights = [file for file in files if file.endswith(".safetensors")]
    if listing.cached is None and any(map(listing.lacks, weights)):
        validate(_fetch(listing, [file for file in files if file not in weights]))
    folder = _fetch(listing, files)
    return ModelFolder(folder, name, folder.name)


def _model_files(files: list[str], place: str) -> list[str]:
    """The files of a model to read. Second copies of the weights (consolidated, original/) are left out."""
    files = [file for file in files if "/" not in file]
    whole = {"model.safetensors", "model.safetensors.index.json"} & {*files}
    if whole and {"adapter_config.json", "adapter_model.safetensors"} <= {*files}:
        raise ModelError(
            "the folder holds a whole model and an adapter, and only one of them can be meant",
            place=place,
            hint="lorafit generate BASE --adapter FOLDER asks the adapter; take adapter_config.json out of the folder "
            "to use the whole model",
        )
    if "model.safetensors" in files:
        weights = ["model.safetensors"]
    elif "model.safetensors.index.json" in files:
        shards = [file for file in files if re.fullmatch(r"(?!consolidated).+-of-\d+\.safetensors", file)]
        weights = ["model.safetensors.index.json", *shards]
    elif "adapter_model.safetensors" in files:
        raise ModelError(
            "this is an adapter, not a model",
            place=place,
            hint="give its base model, and the adapter with --adapter (to train: model.name and lora.init_from)",
        )
    else:
        raise _no_safetensors(files, place, "model.safetensors")
    if "config.json" not in files:
        raise ModelError("the model has no config.json", place=place)
    return _tokenizer_files(files, place) + weights


def _tokenizer_files(files: list[str], place: str) -> list[str]:
    """The files to read for a model's tokenizer; the folder may have no weights."""
    return [file for file in files if any(fnmatchcase(file, known) for known in MODEL_FILES)]


def _adapter_files(files: list[str], place: str) -> list[str]:
    """The files of a PEFT adapter to read."""
    if "adapter_model.safetensors" not in files:
        raise _no_safetensors(files, place, "adapter_model.safetensors")
    if "adapter_config.json" not in files:
        raise ModelError("the adapter has no adapter_config.json", place=place)
    return [*_tokenizer_files(files, place), "adapter_model.safetensors"]


def _no_safetensors(files: list[str], place: str, missing: str) -> ModelError:
    pickles = [file for file in files if file.endswith(PICKLES)]
    if ggufs := [file for file in files if file.endswith(".gguf")]:
        return ModelError(
            f"it holds GGUF files only ({ggufs[0]})",
            place=place,
            hint="download one and give its path, or give the model from which they were made",
        )
    if others := [file for file in files if file.endswith(".safetensors")]:
        hint = f"if it holds the whole model, rename it to {missing}" if len(others) == 1 else _WHAT_TO_GIVE
        return ModelError(f"{missing} is missing: there is {several(others)}", place=place, hint=hint)
    if not pickles:
        return ModelError(f"there are no weights here: {missing} is missing", place=place, hint=_WHAT_TO_GIVE)
    return ModelError(
        f"the weights exist only as a pickle ({pickles[0]}), which can run code when loaded",
        place=place,
        hint="convert them with https://huggingface.co/spaces/safetensors/convert, or, if you trust "
        "them, load them with transformers or peft and call save_pretrained(folder)",
    )


def _list(repository: Repository, offline: bool) -> _Listing:
    """The repository's files, from the hub; from the cache if `offline` or if there is no connection."""
    if not HUB_ID.fullmatch(repository.name):
        raise repository.error(
            f"`{repository.name}` is neither a folder here nor an id of the hub (owner/name)",
            similar_folder(repository.name) or (_WHAT_TO_GIVE if repository.kind == "model" else ""),
        )
    if repository.revision is not None and not is_revision(repository.revision):
        message = f"`{repository.revision}` is no revision: a branch, a tag or a full commit"
        raise repository.error(message)
    if offline or constants.HF_HUB_OFFLINE:
        return _list_cached(repository)
    api = huggingface_hub.HfApi(token=token() or False)
    ask = api.model_info if repository.kind == "model" else api.dataset_info
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    try:
        with explained(repository):
            watch_answers()
            info = ask(repository.name, revision=repository.revision, timeout=timeout, files_metadata=True)
    except LorafitError as error:
        if not isinstance(error.__cause__, httpx.TransportError):
            raise
        try:
            listing = _list_cached(repository)
        except LorafitError:
            raise error from error.__cause__
        logger.warning("no connection to %s: using the cached copy %s", repository.page, listing.commit)
        return listing
    siblings = info.siblings or []
    sizes = {file.rfilename: file.size for file in siblings if file.size is not None}
    return _Listing(
        repository, [file.rfilename for file in siblings], info.sha or "", cached=None, sizes=sizes
    )


def _list_cached(repository: Repository) -> _Listing:
    """The repository's files in the cache."""
    try:
        with explained(repository):
            path = huggingface_hub.snapshot_download(
                repository.name,
                repo_type=repository.kind,
                revision=repository.revision,
                allow_patterns=[],
                local_files_only=True,
            )
    except LorafitError as error:
        if isinstance(error.__cause__, LocalEntryNotFoundError):
            raise _not_cached(repository, f"`{repository.name}`") from error.__cause__
        raise
    folder = Path(path)
    try:
        with explained(repository):
            if (
                folder.parent != _storage(repository).resolve() / "snapshots"
            ):  # where a file of the cache leads
                raise AnswerError("the commit in the cache is no hash")
            check_commit(folder.name)
            tree = huggingface_hub.get_cached_repo_tree(
                repository.name, repo_type=repository.kind, revision=folder.name
            )
        files = [file.path for file in tree]
    except CachedRepoTreeNotFoundError:  # downloaded by a program that stores no listing
        files = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    return _Listing(repository, files, folder.name, folder)


def _fetch(listing: _Listing, files: list[str]) -> Path:
    """The folder with `files` of the listing, after a download of those that are not in the cache."""
    repository, folder = listing.repository, listing.cached
    if folder is not None:
        for file in files:
            if not (folder / file).is_file():
                raise _not_cached(repository, f"{file} of `{repository.name}`")
        return folder
    new = [file for file in files if listing.lacks(file)]
    _check_room(repository, sum(listing.sizes.get(file, 0) for file in new))
    is_new = bool(new)
    # On a terminal the library draws its own bars, also where there is nothing to download.
    has_bars = is_new and sys.stderr.isatty() and all(one_line(file) == file for file in new)
    access = token() or False
    with (
        explained(repository),
        nullcontext() if has_bars else disable_progress_bars(),
        nullcontext() if has_bars else progress(f"downloading {repository.name}"),
        watched_waits(_storage(repository)),
    ):
        watch_answers()
        return Path(
            interruptible(
                lambda bars: huggingface_hub.snapshot_download(
                    repository.name,
                    repo_type=repository.kind,
                    revision=repository.revision,
                    allow_patterns=[glob.escape(file) for file in files],
                    token=access,
                    tqdm_class=bars,
                )
            )
        )


def _storage(repository: Repository) -> Path:
    """The folder of a repository in the library's cache."""
    name = repository.name.replace("/", "--")
    return Path(constants.HF_HUB_CACHE).expanduser() / f"{repository.kind}s--{name}"


def _check_room(repository: Repository, num_bytes: int) -> None:
    """Raise a LorafitError if the disk of the cache has no room for a download of `num_bytes`."""
    cache, blobs = Path(constants.HF_HUB_CACHE), _storage(repository) / "blobs"
    try:
        begun = sum(file.stat().st_size for file in blobs.glob("*.incomplete"))  # they are continued
        free = shutil.disk_usage(existing(cache)).free
    except OSError:
        return  # the download tells what is wrong
    if num_bytes - begun > free:
        raise repository.error(
            f"`{repository.name}` needs {num_bytes - begun:,} bytes, and the disk of the cache has {free:,} free",
            f"{MORE_SPACE} (now {cache})",
        )


def _not_cached(repository: Repository, what: str) -> LorafitError:
    return repository.error(
        f"{what} is not in the local cache, and this run is offline",
        f"fetch it while online: {repository.download_command}",
    )
