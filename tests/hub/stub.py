"""A stand-in for the Hugging Face hub: the few routes that huggingface_hub uses, served from memory."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import unquote, urlsplit

from tests.waiting import HANGS

GOOD_TOKEN = "hf_goodgoodgoodgood"
STRANGER_TOKEN = "hf_strangerstranger"  # valid, but of an account that has accepted no licence


@dataclass
class Repository:
    """Commits by hash, each the files it holds; branches and tags by name."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    is_gated: bool = False
    is_private: bool = False


@dataclass
class Hub:
    """The hub's repositories by route (`owner/name`, `datasets/owner/name`) and what was asked of it."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    lost: set[str] = field(default_factory=set)  # files that are listed but cannot be had
    prefix: str = ""  # of all paths, as a mirror below another site has
    failing_with: int = 503
    stalled_on: str | None = None  # of such a file the first half is sent, and the rest when `goes_on` is set
    has_stalled: threading.Event = field(default_factory=threading.Event)
    goes_on: threading.Event = field(default_factory=threading.Event)
    failing_on: str | None = None  # requests with this in their path get the status above, to play an outage

    def __post_init__(self) -> None:
        hub = self

        class Bound(_Handler):
            stub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}{self.prefix}"

    @property
    def port(self) -> int:
        return self._server.server_port

    def add(self, route: str, files: Mapping[str, bytes | str], *, is_gated: bool = False) -> str:
        """Commit `files` to the repository's main branch; the commit's hash."""
        content = {path: text.encode() if isinstance(text, str) else text for path, text in files.items()}
        commit = hashlib.sha1(repr((route, sorted(content.items()))).encode()).hexdigest()
        repository = self.repositories.setdefault(route, Repository({}, {}))
        repository.commits[commit] = content
        repository.refs["main"] = commit
        repository.is_gated = is_gated
        return commit

    def fetched(self) -> set[str]:
        """The files that were downloaded."""
        paths = (request.removeprefix("GET ") for request in self.requests if request.startswith("GET "))
        return {path.split("/resolve/")[1].partition("/")[2] for path in paths if "/resolve/" in path}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    stub: ClassVar[Hub]

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class's name
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        """What an upload asks for: a repository, which files are large (none is), and one commit."""
        path = unquote(urlsplit(self.path).path).strip("/")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.stub.requests.append(f"POST {path}")
        if self.stub.failing_on is not None and self.stub.failing_on in path:
            return self._send(self.stub.failing_with)
        if path == "api/validate-yaml":
            return self._send(200, json.dumps({"errors": [], "warnings": []}).encode())
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token != GOOD_TOKEN:
            return self._send(403 if token == STRANGER_TOKEN else 401, message="no right to write")
        if path == "api/repos/create":
            wanted = json.loads(body)
            route = f"{wanted['organization']}/{wanted['name']}"
            made = json.dumps({"url": f"{self.stub.url}/{route}"}).encode()
            if route in self.stub.repositories:
                return self._send(409, made, message="You already created this model repo")
            repository = self.stub.repositories[route] = Repository({"0" * 40: {}}, {"main": "0" * 40})
            repository.is_private = wanted.get("visibility") == "private"
            return self._send(200, made)
        route, verb = path.removeprefix("api/models/").rsplit("/", 2)[:2]
        repository = self.stub.repositories[route]
        if verb == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._send(200, json.dumps({"files": files}).encode())
        lines = [json.loads(line) for line in body.splitlines()]
        added = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        commit = hashlib.sha1(body).hexdigest()
        repository.commits[commit] = {**repository.commits[repository.refs["main"]], **added}
        repository.refs["main"] = commit
        done = {"commitUrl": f"{self.stub.url}/{route}/commit/{commit}", "commitOid": commit, "success": True}
        return self._send(200, json.dumps(done).encode())

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)  # a proxy is asked for a whole URL
        if not path.startswith(self.stub.prefix):
            return self._send(404)
        path = path.removeprefix(self.stub.prefix).strip("/")
        self.stub.requests.append(f"{self.command} {path}")
        if self.stub.failing_on is not None and self.stub.failing_on in path:
            return self._send(self.stub.failing_with)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in (GOOD_TOKEN, STRANGER_TOKEN):
            return self._send(401, error="", message="Invalid credentials in Authorization header")
        if path.startswith("api/"):
            return self._api(path.removeprefix("api/").removeprefix("models/"))
        return self._file(path, token)

    def _api(self, path: str) -> None:
        """`owner/name`, `owner/name/revision/R` or `owner/name/tree/R`; datasets with `datasets/` before."""
        for route, repository in self.stub.repositories.items():
            if path == route or path.startswith(route + "/"):
                verb, _, asked = path[len(route) + 1 :].partition("/")
                commit = repository.refs.get(asked or "main", asked)
                if commit not in repository.commits:
                    return self._send(404, error="RevisionNotFound")
                files = repository.commits[commit]
                if verb == "tree":
                    tree = [
                        {"type": "file", "path": name, "size": len(content), "oid": _etag(content)}
                        for name, content in files.items()
                    ]
                    return self._send(200, json.dumps(tree).encode())
                siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
                info = {"id": route.removeprefix("datasets/"), "sha": commit, "siblings": siblings}
                info["private"] = repository.is_private
                return self._send(200, json.dumps(info).encode())
        return self._send(404, error="RepoNotFound")

    def _file(self, path: str, token: str) -> None:
        route, _, rest = path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        repository = self.stub.repositories.get(route)
        if repository is None:
            return self._send(404, error="RepoNotFound")
        if repository.is_gated and token != GOOD_TOKEN:
            return self._send(403 if token else 401, error="GatedRepo")
        commit = repository.refs.get(revision, revision)
        content = repository.commits.get(commit, {}).get(name)
        if content is None or name in self.stub.lost:
            return self._send(404, error="EntryNotFound")
        headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": commit}
        if self.command == "GET" and name == self.stub.stalled_on:
            return self._stall(content, headers)
        return self._send(200, content, **headers)

    def _stall(self, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        half = len(content) // 2
        self.wfile.write(content[:half])
        self.stub.has_stalled.set()
        self.stub.goes_on.wait(HANGS)
        with contextlib.suppress(OSError):  # the client has gone
            self.wfile.write(content[half:])

    def _send(
        self, status: int, body: bytes = b"", *, error: str = "", message: str = "", **headers: str
    ) -> None:
        self.send_response(status)
        for name, value in {"X-Error-Code": error, "X-Error-Message": message, **headers}.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
