"""Files from the Hugging Face hub: models, adapters and datasets, pinned to a commit and cached.

Only the files that the program reads are fetched, by name: never pickled weights, never code.
"""

from __future__ import annotations

import difflib
import errno
import glob
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import httpx
import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)
from huggingface_hub.utils.tqdm import disable_progress_bars

from lorafit.errors import ConfigError, DataError, LorafitError, ModelError, several
from lorafit.hub.dataset_splits import (
    FILE_KINDS,
    HUB_ID,
    ManyConfigurationsError,
    file_kind,
    of_one_kind,
    splits_of_card,
    splits_of_names,
)
from lorafit.observe.progress import progress
from lorafit.redact import dotenv

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

TOKENS_PAGE = "https://huggingface.co/settings/tokens"
_WHAT_TO_GIVE = "give a folder with safetensors weights, or a hub id (owner/name)"

logger = logging.getLogger(__name__)


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


def model_folder(name: str, *, revision: str | None = None, offline: bool = False) -> ModelFolder:
    """The folder of the model `name`: a local folder, or a hub id `owner/name`, downloaded if needed.

    `revision` is a branch, tag or commit of the hub's repository. With `offline` (or HF_HUB_OFFLINE=1) only files of
    the cache are used and no connection is opened. Raises ModelError.
    """
    return _folder(name, revision, offline, _model_files)


def tokenizer_folder(name: str, *, revision: str | None = None, offline: bool = False) -> ModelFolder:
    """As `model_folder`, but without weights: the folder of the model's tokenizer."""
    return _folder(name, revision, offline, _tokenizer_files)


def adapter_folder(name: str, *, revision: str | None = None, offline: bool = False) -> ModelFolder:
    """As `model_folder`, for a PEFT adapter."""
    return _folder(name, revision, offline, _adapter_files)


def dataset_files(
    name: str, *, revision: str | None = None, split: str = "train", offline: bool = False
) -> DatasetFiles:
    """The data files of `split` of the hub dataset `name` (`owner/name`), downloaded if needed.

    The dataset card says which files these are, else the files' names, by the rules of the `datasets` library. A
    dataset's script is never fetched. Raises DataError.
    """
    repository = _Repository("dataset", name, revision)
    listing = _list(repository, offline)
    card = ""
    if "README.md" in listing.files:
        card = (_fetch(listing, ["README.md"]) / "README.md").read_text(encoding="utf-8", errors="replace")
    data = [file for file in listing.files if file_kind(file)]
    try:
        splits = splits_of_card(card, data) or splits_of_names(data)
    except ManyConfigurationsError as error:
        raise repository.error(
            f"`{name}` has several configurations and no default one: {error}",
            f"fetch it ({repository.download_command} --local-dir FOLDER) and give the files of one of them",
        ) from None
    if split not in splits:
        found = (
            f"its splits: {', '.join(sorted(splits))}"
            if splits
            else f"it has no {' '.join(FILE_KINDS)} files"
        )
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
class _Repository:
    """A repository of the hub as the user named it."""

    kind: Literal["model", "dataset"]
    name: str
    revision: str | None

    @property
    def page(self) -> str:
        return f"{constants.ENDPOINT}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"

    @property
    def place(self) -> str:
        return self.page + (f" at revision {self.revision}" if self.revision else "")

    @property
    def download_command(self) -> str:
        options = " --repo-type dataset" if self.kind == "dataset" else ""
        return f"hf download {self.name}{options}" + (f" --revision {self.revision}" if self.revision else "")

    def error(self, message: str, hint: str = "") -> LorafitError:
        kind = ModelError if self.kind == "model" else DataError
        return kind(message, place=self.place, hint=hint)


@dataclass(frozen=True, slots=True)
class _Listing:
    """The files of a repository at a commit; `cached` is their folder where nothing may be downloaded."""

    repository: _Repository
    files: list[str]
    commit: str
    cached: Path | None


def _folder(
    name: str, revision: str | None, offline: bool, choose: Callable[[list[str], str], list[str]]
) -> ModelFolder:
    """The local folder or hub download `name`; `choose` returns the files to read, or raises ModelError."""
    path = Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ModelError(
                f"a local folder has no revision `{revision}`",
                place=str(path),
                hint="leave the revision out, or give a model of the hub (owner/name)",
            )
        choose([file.name for file in path.iterdir()], str(path))
        return ModelFolder(path, name, None)
    if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1:
        raise ModelError(f"there is no folder `{name}`", hint=_similar_folder(name) or _WHAT_TO_GIVE)
    listing = _list(_Repository("model", name, revision), offline)
    folder = _fetch(listing, choose(listing.files, listing.repository.place))
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


def _list(repository: _Repository, offline: bool) -> _Listing:
    """The repository's files, from the hub; from the cache if `offline` or if there is no connection."""
    if not HUB_ID.fullmatch(repository.name):
        raise repository.error(
            f"`{repository.name}` is neither a folder here nor an id of the hub (owner/name)",
            _similar_folder(repository.name),
        )
    if offline or constants.HF_HUB_OFFLINE:
        return _list_cached(repository)
    api = huggingface_hub.HfApi(token=token() or False)
    ask = api.model_info if repository.kind == "model" else api.dataset_info
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    try:
        with _explained(repository):
            info = ask(repository.name, revision=repository.revision, timeout=timeout)
    except LorafitError as error:
        if not isinstance(error.__cause__, httpx.TransportError):
            raise
        try:
            listing = _list_cached(repository)
        except LorafitError:
            raise error from error.__cause__
        logger.warning("no connection to %s: using the cached copy %s", repository.page, listing.commit)
        return listing
    assert info.sha is not None  # the hub names the commit of every revision
    return _Listing(repository, [file.rfilename for file in info.siblings or []], info.sha, cached=None)


def _list_cached(repository: _Repository) -> _Listing:
    """The repository's files in the cache."""
    try:
        with _explained(repository):
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
    is_new = any(
        not isinstance(
            huggingface_hub.try_to_load_from_cache(
                repository.name, file, repo_type=repository.kind, revision=listing.commit
            ),
            str,
        )
        for file in files
    )
    # On a terminal the library draws its own bars, also where there is nothing to download.
    has_bars = is_new and sys.stderr.isatty()
    access = token() or False
    with (
        _explained(repository),
        nullcontext() if has_bars else disable_progress_bars(),
        nullcontext() if has_bars else progress(f"downloading {repository.name}"),
    ):
        return Path(
            huggingface_hub.snapshot_download(
                repository.name,
                repo_type=repository.kind,
                revision=repository.revision,
                allow_patterns=[glob.escape(file) for file in files],
                token=access,
            )
        )


def _not_cached(repository: _Repository, what: str) -> LorafitError:
    return repository.error(
        f"{what} is not in the local cache, and this run is offline",
        f"fetch it while online: {repository.download_command}",
    )


@contextmanager
def _explained(repository: _Repository) -> Iterator[None]:
    """Replace an error of the library by one of lorafit, with the library's error as its cause."""
    try:
        yield
    except (httpx.HTTPError, OSError, ValueError, RuntimeError, XetDownloadError) as raised:
        error: BaseException = raised
        while isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
            error = error.__cause__  # the library raises this after the error of the connection
        raise repository.error(*_explanation(repository, error)) from error


def _explanation(repository: _Repository, error: BaseException) -> tuple[str, str]:
    """(message, hint) for `error`."""
    name, log_in = repository.name, "set HF_TOKEN or run `hf auth login`"
    match error:
        case GatedRepoError():
            return (
                f"`{name}` is gated: only accounts that accepted its licence may download it",
                f"accept the licence on {repository.page}, then {log_in} with that account",
            )
        case RevisionNotFoundError():
            return (
                f"`{name}` has no revision `{repository.revision}`",
                "give a branch, a tag or a full commit",
            )
        case RepositoryNotFoundError():
            hint = f"check the spelling; if the {repository.kind} is private, {log_in}"
            similar = _similar_folder(name)
            return f"the hub has no {repository.kind} `{name}`", f"{hint}; {similar}" if similar else hint
        case RemoteEntryNotFoundError():
            return (
                f"a file of `{name}` is missing: {error.response.url.path}",
                "try again, or another revision",
            )
        case HfHubHTTPError() if error.response.status_code == 401:
            return "the hub does not accept your token", f"create a new one ({TOKENS_PAGE}) and {log_in}"
        case HfHubHTTPError() if error.response.status_code == 403:
            return f"your token may not read `{name}`", f"give it that right on {TOKENS_PAGE}"
        case HfHubHTTPError():
            return f"the hub answered with an error ({error.response.status_code})", "try again later"
        case HFValidationError():
            return f"`{name}` is not an id of the hub: {error}", ""
        case httpx.TransportError():
            hint = "check the network, the proxy and HF_ENDPOINT; files in the cache can be used offline"
            return (
                f"there is no folder `{name}`, and no connection to the hub: "
                f"{str(error) or type(error).__name__}",
                "; ".join(filter(None, (_similar_folder(name), hint))),
            )
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return (
                f"the disk is full: no room to download to {constants.HF_HUB_CACHE}",
                "free some space (`hf cache prune`), or set HF_HOME to a larger disk",
            )
        case _:
            return f"the download failed: {str(error).strip().partition(chr(10))[0]}", "try again"


def _similar_folder(name: str) -> str:
    """A hint at the local folder with a name similar to `name`, if there is one."""
    path = Path(name).expanduser()
    parent = path.parent if path.parent.is_dir() else Path()
    near = difflib.get_close_matches(path.name, [f.name for f in parent.iterdir() if f.is_dir()], n=1)
    return f"did you mean the folder {os.path.join('.', parent, near[0])}?" if near else ""  # noqa: PTH118  keeps ./
