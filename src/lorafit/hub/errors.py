"""Repositories of the hub, and its library's errors as errors of lorafit: what is wrong, and what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)

from lorafit.errors import DataError, LorafitError, ModelError, similar
from lorafit.hub.answers import AnswerError
from lorafit.redact import shell

TOKENS_PAGE = "https://huggingface.co/settings/tokens"
MORE_SPACE = "free some space (`hf cache prune`), or set HF_HOME to a larger disk"
_CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT)


@dataclass(frozen=True, slots=True)
class Repository:
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
        words = ["--repo-type", "dataset"] if self.kind == "dataset" else []
        return shell(
            "hf", "download", self.name, *words, *(["--revision", self.revision] if self.revision else [])
        )

    def error(self, message: str, hint: str = "") -> LorafitError:
        kind = ModelError if self.kind == "model" else DataError
        return kind(message, place=self.place, hint=hint)


@contextmanager
def explained(repository: Repository) -> Iterator[None]:
    """Replace an error of the library by one of lorafit, with the library's error as its cause."""
    try:
        yield
    except (
        *(httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, RuntimeError, XetDownloadError),
        ImportError,  # of a proxy without its package
        *(
            TypeError,
            KeyError,
            AttributeError,
            AssertionError,
        ),  # of an answer that the library did not expect
    ) as raised:
        error: BaseException = raised
        while isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
            error = error.__cause__  # the library raises this after the error of the connection
        raise repository.error(*_explanation(repository, error)) from error


def _explanation(repository: Repository, error: BaseException) -> tuple[str, str]:
    """(message, hint) for `error`."""
    name, log_in = repository.name, "set HF_TOKEN or run `hf auth login`"
    match error:
        case AnswerError() | TypeError() | KeyError() | AttributeError() | AssertionError():
            hint = (
                "HF_ENDPOINT, a proxy or a cache that others can write may have changed it (`lorafit doctor`)"
            )
            return f"the hub's answer about `{name}` cannot be used: {_first_line(error)}", hint
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
            similar = similar_folder(name)
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
                "; ".join(filter(None, (similar_folder(name), hint))),
            )
        case TimeoutError() if not isinstance(error, httpx.HTTPError):  # of a wait for another process
            return (
                f"`{name}` cannot be downloaded: {error}",
                "stop that process, or let it go on, and try again",
            )
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return (
                f"the disk is full: no room to download to {constants.HF_HUB_CACHE}",
                MORE_SPACE,
            )
        case OSError() if error.errno in _CANNOT_WRITE and not isinstance(error, httpx.HTTPError):
            return (
                f"cannot write to the cache of the hub, {constants.HF_HUB_CACHE}: {error.strerror}",
                "set HF_HOME to a folder that you can write",
            )
        case ImportError() | httpx.InvalidURL() | ValueError():
            return (
                f"the address of the hub or of a proxy cannot be used: {_first_line(error)}",
                "correct or unset HF_ENDPOINT, HTTPS_PROXY, HTTP_PROXY or ALL_PROXY (`lorafit doctor` lists them)",
            )
        case _:
            return f"the download failed: {_first_line(error)}", "try again"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def similar_folder(name: str) -> str:
    """A hint at the local folder with a name similar to `name`, if there is one."""
    path = Path(name).expanduser()
    parent = path.parent if path.parent.is_dir() else Path()
    near = similar(path.name, [f.name for f in parent.iterdir() if f.is_dir()])
    return f"did you mean the folder {os.path.join('.', parent, near[0])}?" if near else ""  # noqa: PTH118  keeps ./
