"""Uploads an export to the Hugging Face hub, by default to a private repository."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import httpx
import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils.tqdm import disable_progress_bars

from lorafit.errors import ConfigError, RunError
from lorafit.hub.client import token
from lorafit.hub.errors import TOKENS_PAGE
from lorafit.observe.progress import progress


def push(folder: Path, repository: str, *, private: bool = True) -> str:
    """Upload all of `folder` in one commit and return its address. A repository that does not exist is created.

    The token comes from HF_TOKEN or the stored login, never from an argument. Raises ConfigError without one, and
    RunError if the hub refuses; the export stays on the disk.
    """
    access = token()
    if access is None:
        raise ConfigError("pushing needs a token of the hub", hint="set HF_TOKEN or run `hf auth login`")
    api = huggingface_hub.HfApi(token=access)
    has_bars = sys.stderr.isatty()
    try:
        created = api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.model_info(created.repo_id).private:
            raise RunError(
                f"`{repository}` exists already, and everybody can see it",
                hint="add --public to push there, or name another repository",
            )
        with (
            nullcontext() if has_bars else disable_progress_bars(),
            nullcontext() if has_bars else progress(f"pushing to {repository}"),
        ):
            commit = api.upload_folder(
                repo_id=created.repo_id, folder_path=folder, commit_message="Export of a lorafit run"
            )
    except HFValidationError as error:
        raise ConfigError(f"`{repository}` is not an id of the hub: {error}", place="--push") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        denied = status in (401, 403)
        hint = f"the token needs write access: {TOKENS_PAGE}" if denied else "try again later"
        message = f"the hub refused ({status}); the export stays on the disk"
        raise RunError(message, place=repository, hint=hint) from None
    except (httpx.HTTPError, OSError, RuntimeError) as error:
        if isinstance(error, RunError):
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RunError(
            f"the export was not pushed: {reason}", place=repository, hint="it is on the disk; try again"
        ) from None
    return str(commit.repo_url)
