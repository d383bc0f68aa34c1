"""Each field of a hub's answer, or of its cache, that becomes a path or a reference is checked before it is used."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from huggingface_hub import _tree_cache
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.hostile.foreign import NASTY
from tests.hub.stub import Hub
from tests.hub.test_hub import MODEL

from lorafit.errors import DataError, LorafitError, ModelError
from lorafit.hub.answers import AnswerError, _check, check_files, is_revision
from lorafit.hub.client import dataset_files, model_folder

OUTSIDE = (
    "../x",
    "/x",
    "a/../../x",
    "a//x",
    "a/./x",
    "C:x",
    "a\\..\\x",
    "",
    "a\0b",
    7,
    None,
    ["x"],
    {"a": 1},
)
NO_HASH = ("../../../x", "a" * 39, "A" * 40, "a" * 40 + "/..", "a" * 40 + "\n", "", 5, ["a" * 40], {})
NO_SIZE = (-1, 1.5, True, "9", [1], 1 << 70)
NO_ETAG = ("../../x", "a/b", '"../x"', "", "..", "a b", "\x1b[2J")

Answer = Callable[[str, dict[str, str], bytes], tuple[dict[str, str], bytes]]


@pytest.fixture
def answers(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer], None]:
    """Changes (path, headers, body) of each answer of the hub on its way to the library's session."""

    return lambda change: install(monkeypatch, change)


def install(patch: pytest.MonkeyPatch, change: Answer) -> None:
    handle = httpx.HTTPTransport.handle_request

    def changed(self: httpx.HTTPTransport, request: httpx.Request) -> httpx.Response:
        response = handle(self, request)
        headers, body = change(request.url.path, dict(response.headers), response.read())
        if request.method == "GET":
            headers["content-length"] = str(len(body))
        status = 302 if "location" in headers else response.status_code
        return httpx.Response(status, headers=headers, content=body if request.method == "GET" else b"")

    patch.setattr(httpx.HTTPTransport, "handle_request", changed)


def in_body(part: str, **fields: Any) -> Answer:
    """Fields of the facts about the repository (`info`), of its first file there (`file`) or in the tree (`tree`)."""

    def change(path: str, headers: dict[str, str], body: bytes) -> tuple[dict[str, str], bytes]:
        if "/api/" in path and ("/tree/" in path) == (part == "tree"):
            value = json.loads(body)
            (value if part == "info" else value[0] if part == "tree" else value["siblings"][0]).update(fields)
            body = json.dumps(value).encode()
        return headers, body

    return change


def in_headers(name: str, value: str) -> Answer:
    return lambda path, headers, body: (headers | ({name: value} if "/resolve/" in path else {}), body)


HOSTILE: dict[str, Answer] = {
    **{f"sha {value!r}": in_body("info", sha=value) for value in NO_HASH},
    **{f"sibling {value!r}": in_body("file", rfilename=value) for value in OUTSIDE},
    **{f"size {value!r}": in_body("file", size=value) for value in NO_SIZE},
    **{f"tree {value!r}": in_body("tree", path=value) for value in OUTSIDE},
    **{f"digest {value!r}": in_body("tree", lfs={"oid": value, "size": 1}) for value in NO_ETAG},
    **{f"etag {value!r}": in_headers("etag", value) for value in NO_ETAG},
    "linked etag": in_headers("x-linked-etag", "../../x"),
    "commit of a file": in_headers("x-repo-commit", "../../x"),
    "siblings 5": in_body("info", siblings=5),
    "siblings of texts": in_body("info", siblings=["x"]),
    "no JSON": lambda path, headers, body: (headers, b"<html>" if "/api/" in path else body),
    "a list": lambda path, headers, body: (headers, b"[1]" if "/api/" in path else body),
    "deep": lambda path, headers, body: (headers, b"[" * 9999 + b"]" * 9999 if "/api/" in path else body),
    "other protocol": in_headers("location", "ftp://127.0.0.1/x"),
    "warning": in_headers("x-hf-warning", "a; \x1b]0;owned\x07"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_field_that_leads_elsewhere_is_refused_and_nothing_is_written_there(
    name: str, hub: Hub, answers: Callable[[Answer], None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.add("owner/tiny", MODEL)
    answers(HOSTILE[name])
    with pytest.raises(ModelError) as caught:
        model_folder("owner/tiny")
    assert "\x1b" not in str(caught.value) + "".join(capfd.readouterr())
    files = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert all(path.is_relative_to(tmp_path / "cache") for path in files)
    assert not [path for path in files if path.name == "x"]


def test_a_redirect_from_https_to_http_is_refused() -> None:
    request = httpx.Request("GET", "https://hub.example/owner/tiny/resolve/main/a")
    _check(httpx.Response(302, headers={"Location": "https://cdn.example/a"}, request=request))
    _check(httpx.Response(302, headers={"Location": "/other/a"}, request=request))
    with pytest.raises(AnswerError, match="from https to http"):
        _check(httpx.Response(302, headers={"Location": "http://10.0.0.1/a"}, request=request))


@pytest.mark.parametrize("content", ["../../../evil", "{evil}", "a" * 40 + "/../../../../evil", "\x1b[2J"])
def test_a_cache_that_leads_elsewhere_is_not_used(content: str, hub: Hub, tmp_path: Path) -> None:
    hub.add("owner/tiny", MODEL)
    model_folder("owner/tiny")
    evil = tmp_path / "evil"
    evil.mkdir()
    for name, text in MODEL.items():
        path = evil / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    storage = tmp_path / "cache" / "models--owner--tiny"
    (storage / "refs" / "main").write_text(content.format(evil=evil))
    with pytest.raises(ModelError):
        model_folder("owner/tiny", offline=True)


@pytest.mark.parametrize("name", ["../../../../evil", "/etc/passwd", "tokenizer/../../x.json"])
def test_a_cached_listing_names_only_files_inside(name: str, hub: Hub, tmp_path: Path) -> None:
    commit = hub.add("owner/tiny", MODEL)
    model_folder("owner/tiny")
    (listing,) = (tmp_path / "cache").rglob(f"trees/{commit}.json")
    value = json.loads(listing.read_text())
    value["files"][name] = {"size": 1, "blob_id": "0" * 40}
    listing.write_text(json.dumps(value))
    _tree_cache._IN_MEMORY_TREE_CACHE.clear()
    with pytest.raises(ModelError, match="no path in a repository"):
        model_folder("owner/tiny", offline=True)


@pytest.mark.parametrize("revision", ["../../x", "/etc", "a//b", "-x", "a b", "main\n", "\x1b[2J", "..", ""])
def test_a_revision_that_no_repository_has_is_not_looked_up(revision: str, hub: Hub) -> None:
    with pytest.raises(ModelError, match="is no revision"):
        model_folder("owner/tiny", revision=revision)
    assert not hub.requests


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/3", "feature/a-b", "a" * 40, "4a5b6c7"])
def test_a_revision_that_git_allows_is_one(revision: str) -> None:
    assert is_revision(revision)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(NASTY) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NASTY), inner, max_size=3),
    max_leaves=6,
)
paths = st.sampled_from(OUTSIDE) | json_values
FIELDS = {
    "info": ("sha", "siblings", "id", "private", "lastModified", "tags", "cardData", "config", "safetensors"),
    "file": ("rfilename", "size", "blobId", "lfs"),
    "tree": ("path", "size", "oid", "type", "lfs", "xetHash", "lastCommit"),
}
HEADERS = (
    "etag",
    "x-linked-etag",
    "x-repo-commit",
    "x-linked-size",
    "x-xet-hash",
    "x-hf-warning",
    "x-error-message",
)
fields = st.sampled_from([(part, name) for part in FIELDS for name in FIELDS[part]])
in_answers = st.builds(lambda field, value: in_body(field[0], **{field[1]: value}), fields, paths)
in_answers |= st.builds(
    lambda name, value: in_headers(name, re.sub("[^ -~\x1b]", "", value)),
    st.sampled_from(HEADERS),
    st.sampled_from([*NASTY, *map(str, OUTSIDE), *map(str, NO_HASH), *NO_ETAG]),
)


@settings(
    max_examples=3000 if os.environ.get("LORAFIT_LONG") else 30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(changes=st.lists(in_answers, min_size=1, max_size=3))
def test_any_answer_is_used_or_refused_and_nothing_is_written_elsewhere(
    changes: list[Answer], hub: Hub, tmp_path: Path
) -> None:
    hub.add("owner/tiny", MODEL)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)

    def all_of(path: str, headers: dict[str, str], body: bytes) -> tuple[dict[str, str], bytes]:
        for change in changes:
            with contextlib.suppress(
                ValueError, KeyError, IndexError, TypeError, AttributeError
            ):  # by the one before
                headers, body = change(path, headers, body)
        return headers, body

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(ModelError):
        install(patch, all_of)
        folder = model_folder("owner/tiny").path
        assert folder.parent == (tmp_path / "cache" / "models--owner--tiny" / "snapshots").resolve()
    written = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert all(path.is_relative_to(tmp_path / "cache") for path in written)


@settings(
    max_examples=1000 if os.environ.get("LORAFIT_LONG") else 20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    ref=st.sampled_from([*NASTY, *filter(lambda value: isinstance(value, str), (*OUTSIDE, *NO_HASH))]),
    listing=json_values | st.dictionaries(st.sampled_from(NASTY + OUTSIDE[:7]), json_values, max_size=3),
)
def test_any_foreign_cache_is_used_or_refused(ref: str, listing: Any, hub: Hub, tmp_path: Path) -> None:
    commit = hub.add("owner/tiny", MODEL)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    _tree_cache._IN_MEMORY_TREE_CACHE.clear()
    storage = tmp_path / "cache" / "models--owner--tiny"
    model_folder("owner/tiny")
    for path, content in (
        (storage / "refs" / "main", commit if isinstance(listing, dict) else ref),
        (storage / "trees" / f"{commit}.json", json.dumps({"format_version": 1, "files": listing})),
    ):
        path.write_bytes(content.encode(errors="surrogatepass"))
    _tree_cache._IN_MEMORY_TREE_CACHE.clear()
    with contextlib.suppress(ModelError):
        folder = model_folder("owner/tiny", offline=True).path
        assert folder == (storage / "snapshots" / commit).resolve()


@given(st.text("ab./\\:\0\n%~", max_size=9))
def test_a_path_that_is_accepted_stays_in_its_folder(name: str) -> None:
    try:
        check_files([name])
    except AnswerError:
        return
    assert (Path("/r/s") / name).is_relative_to("/r/s")
    assert ".." not in Path(name).parts
    assert "\0" not in name


def test_a_card_of_aliases_does_not_become_a_text_without_end(hub: Hub) -> None:
    levels = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))
    for key in ("config_name", "data_dir", "data_files"):
        card = f"---\na0: &a0 [x]\n{levels}configs:\n- {key}: *a8\n  default: true\n---\n"
        hub.add("datasets/owner/rows", {"train.json": "[]", "README.md": card})
        try:
            dataset_files("owner/rows")
        except LorafitError as error:
            assert isinstance(error, DataError)


def test_the_stub_is_changed_by_what_the_tests_install(hub: Hub, answers: Callable[[Answer], None]) -> None:
    """Without a change the model is read, and each answer passes through the change."""
    hub.add("owner/tiny", MODEL)
    seen: set[str] = set()

    def look(path: str, headers: dict[str, str], body: bytes) -> tuple[dict[str, str], bytes]:
        seen.add(urlsplit(path).path.split("/")[1])
        return headers, body

    answers(look)
    assert model_folder("owner/tiny").path.is_dir()
    assert seen == {"api", "owner"}
