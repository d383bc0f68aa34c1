"""What a hub answers is foreign: fields that become a path or a reference are checked before anything uses them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import httpx
import huggingface_hub

from lorafit.redact import printable

COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
_REVISION = re.compile(r"\w[\w./+@-]*", re.ASCII)  # a branch, a tag, or `refs/pr/1`
_ETAG = re.compile(r"""(?:W/)?["]?[\w+=:-]+["]?""", re.ASCII)  # the library names a file after it
_DRIVE = re.compile(r"[A-Za-z]:")
_MAX_SIZE = 1 << 62  # bytes


class AnswerError(ValueError):
    """A hub's answer, or a file of its cache, that cannot be used; the text says which field it is."""


def watch_answers() -> None:
    """Have each answer to the library's session checked before the library reads it."""
    session = huggingface_hub.get_session()
    hooks = session.event_hooks
    if _check not in hooks["response"]:
        session.event_hooks = {**hooks, "response": [*hooks["response"], _check]}


def is_revision(text: str) -> bool:
    """Whether `text` can be a branch, a tag or a commit: the library makes a path of it."""
    return _REVISION.fullmatch(text) is not None and ".." not in text and "//" not in text


def check_files(names: Iterable[object]) -> None:
    """Raise AnswerError unless each of `names` is the path of a file inside of a repository."""
    for name in names:
        if not isinstance(name, str) or not _is_inside(name):
            raise AnswerError(f"it names a file {name!r}, which is no path in a repository")


def check_commit(commit: object) -> None:
    """Raise AnswerError unless `commit` is the hash of a commit."""
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise AnswerError(f"its commit is {commit!r}, which is no hash")


def _is_inside(name: str) -> bool:
    parts = name.split("/")
    return not (_DRIVE.match(name) or "\\" in name or "\0" in name or {"", ".", ".."} & {*parts})


def _check(response: httpx.Response) -> None:
    headers = response.headers
    for name in ("ETag", "X-Linked-ETag"):
        if name in headers and not _ETAG.fullmatch(headers[name]):
            raise AnswerError(f"its {name} is {headers[name]!r}")
    if "X-Repo-Commit" in headers:
        check_commit(headers["X-Repo-Commit"])
    for name in ("X-HF-Warning", "X-Error-Message"):  # the library shows them
        if name in headers and printable(headers[name]) != headers[name]:
            raise AnswerError(f"its {name} has control characters")
    if response.is_redirect:
        target = response.request.url.join(headers["Location"])
        if target.scheme not in ("https", response.request.url.scheme):
            raise AnswerError(f"it leads from {response.request.url.scheme} to {target.scheme}")
    elif response.is_success and "/api/" in response.request.url.path and response.request.method == "GET":
        response.read()
        try:
            body = response.json()
        except (ValueError, RecursionError):
            raise AnswerError("it is not JSON") from None
        _check_body(body)


def _check_body(body: Any) -> None:
    """Check the facts about a repository, or a page of the list of its files."""
    entries = body if isinstance(body, list) else [body]
    if not all(isinstance(entry, dict) for entry in entries):
        raise AnswerError("it is no JSON object")
    if isinstance(body, dict):
        if body.get("sha") is not None:
            check_commit(body["sha"])
        siblings = body.get("siblings") or []
        if not isinstance(siblings, list) or not all(isinstance(entry, dict) for entry in siblings):
            raise AnswerError("its list of files is none")
        check_files(entry.get("rfilename") for entry in siblings)
        entries = siblings
    else:
        check_files(entry.get("path") for entry in entries)
    for entry in entries:
        large = entry.get("lfs") or {}
        for size in (entry.get("size"), large.get("size") if isinstance(large, dict) else large):
            if size is not None and (type(size) is not int or not 0 <= size < _MAX_SIZE):
                raise AnswerError(f"the size of a file is {size!r}")
        for key in ("oid", "sha256"):  # the library names a file after the latter
            if isinstance(large, dict) and not _ETAG.fullmatch(str(large.get(key, "0"))):
                raise AnswerError(f"the digest of a file is {large[key]!r}")
