"""The hub through proxies and mirrors, with caches that cannot be written, and weights that are not fetched in vain."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from tests.hub.conftest import point_to
from tests.hub.stub import Hub
from tests.tiny_models import write_model
from tests.waiting import HANGS

from lorafit.config.load import load_config
from lorafit.errors import LorafitError, ModelError
from lorafit.hub import client
from lorafit.hub.client import dataset_files, model_folder
from lorafit.infer.model import load
from lorafit.plan.planner import RunInputs

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()


class Socks(socketserver.ThreadingTCPServer):
    """A SOCKS5 proxy that connects every request to `port` of this machine."""

    def __init__(self, port: int) -> None:
        self.asked: list[bytes] = []
        proxy = self

        class Connection(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                client = self.request
                client.sendall(b"\x05\x00" if client.recv(64) else b"")
                proxy.asked.append(client.recv(300))
                with socket.create_connection(("127.0.0.1", port)) as hub:
                    client.sendall(b"\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00")
                    back = threading.Thread(target=self.copy, args=(hub, client))
                    back.start()
                    self.copy(client, hub)
                    back.join()

            def copy(self, one: socket.socket, other: socket.socket) -> None:
                try:
                    while data := one.recv(65536):
                        other.sendall(data)
                    other.shutdown(socket.SHUT_WR)
                except OSError:
                    pass

        super().__init__(("127.0.0.1", 0), Connection)
        self.daemon_threads = True
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


def test_through_a_socks_proxy(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("datasets/owner/rows", {"train.json": "[]"})
    point_to("http://hub.invalid", monkeypatch)
    with Socks(hub.port) as proxy:
        monkeypatch.setenv("ALL_PROXY", f"socks5://127.0.0.1:{proxy.server_address[1]}")
        (file,) = dataset_files("owner/rows").paths
        assert file.read_text() == "[]"
        huggingface_hub.close_session()
        proxy.shutdown()
    assert any(b"hub.invalid" in asked for asked in proxy.asked)


def test_through_an_http_proxy(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("datasets/owner/rows", {"train.json": "[]"})
    point_to("http://hub.invalid", monkeypatch)
    monkeypatch.setenv("HTTP_PROXY", hub.url)
    assert dataset_files("owner/rows").paths[0].read_text() == "[]"


@pytest.mark.parametrize(
    "address", ["socks5://127.0.0.1:9", "http://127.0.0.1:9", "http://me:pa55@127.0.0.1:9"]
)
def test_a_proxy_that_does_not_answer_is_no_connection(
    address: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", address)
    with pytest.raises(ModelError, match="no connection to the hub") as caught:
        model_folder("owner/tiny")
    assert "proxy" in caught.value.problems[0].hint
    assert "pa55" not in str(caught.value)


@pytest.mark.parametrize("address", ["ftp://me:pa55word@proxy:1", "http://proxy:notaport", "socks5://[::1"])
def test_an_address_that_is_none_of_a_proxy_is_named(
    address: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", address)
    with pytest.raises(ModelError, match="the address of the hub or of a proxy cannot be used") as caught:
        model_folder("owner/tiny")
    assert "ALL_PROXY" in caught.value.problems[0].hint
    assert "pa55word" not in str(caught.value)


def test_a_proxy_whose_package_is_missing_is_an_error_of_the_user(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    with pytest.raises(ModelError, match="socksio"):
        model_folder("owner/tiny")


@pytest.mark.parametrize(
    "endpoint", ["hub.example", "http://", "://", "http://exa mple", "http://127.0.0.1:x"]
)
def test_an_endpoint_that_is_no_address_is_an_error_of_the_user(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_to(endpoint, monkeypatch)
    with pytest.raises(ModelError) as caught:
        model_folder("owner/tiny")
    assert "HF_ENDPOINT" in caught.value.problems[0].hint


@pytest.mark.slow
@pytest.mark.parametrize("path", ["", "/", "/mirror/hf", "/mirror/hf/"])
def test_a_mirror_below_a_path_and_with_a_slash(path: str, tmp_path: Path) -> None:
    hub = Hub(prefix=path.rstrip("/"))
    hub.add("datasets/owner/rows", {"train.json": "[]"})
    source = "from lorafit.hub.client import *; print(dataset_files('owner/rows').paths[0].read_text())"
    endpoint = f"http://127.0.0.1:{hub.port}{path}"
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", source], env=env, capture_output=True, text=True, timeout=HANGS, check=False
    )
    hub.close()
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_cache_that_cannot_be_written_is_named(
    number: int, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("datasets/owner/rows", {"train.json": "[]", "test.json": "[]"})
    first = dataset_files("owner/rows")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    for name in ("makedirs", "mkdir", "replace", "rename", "symlink", "chmod"):
        monkeypatch.setattr(os, name, refuse)
    assert dataset_files("owner/rows") == first  # what is there can be used
    with pytest.raises(
        LorafitError, match=f"cannot write to the cache of the hub, {constants.HF_HUB_CACHE}: "
    ) as caught:
        dataset_files("owner/rows", split="test")
    assert "HF_HOME" in caught.value.problems[0].hint


def test_a_cache_below_a_file_is_named(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("datasets/owner/rows", {"train.json": "[]"})
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(LorafitError, match="cannot write to the cache of the hub"):
        dataset_files("owner/rows")


# Weights


def files_of(folder: Path, **changes: Any) -> dict[str, bytes | str]:
    """The files of a tiny model; `changes` are made in its config.json, a None removes the key."""
    files: dict[str, bytes | str] = {path.name: path.read_bytes() for path in folder.iterdir()}
    config = {**json.loads(files["config.json"]), **changes}
    files["config.json"] = json.dumps({key: value for key, value in config.items() if value is not None})
    return files


QUANTISED = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}


@pytest.mark.parametrize(
    ("changes", "lost", "message"),
    [
        ({"model_type": "gemma9"}, "", "model type `gemma9` is not supported"),
        (QUANTISED, "", "quantised"),
        ({"hidden_size": "many"}, "", "hidden_size"),
        ({}, "tokenizer.json", "tokenizer"),
    ],
    ids=["type", "quantised", "field", "tokenizer"],
)
@pytest.mark.parametrize("command", ["train, plan and check", "generate and serve"])
def test_no_weight_is_fetched_of_a_model_that_is_refused(
    command: str, changes: dict[str, Any], lost: str, message: str, hub: Hub, tmp_path: Path
) -> None:
    files = files_of(write_model(tmp_path / "model"), **changes)
    files.pop(lost, None)
    hub.add("owner/tiny", files)
    with pytest.raises(LorafitError, match=message):
        if command == "generate and serve":
            load("owner/tiny", device="cpu")
        else:
            RunInputs.read(load_config(None, ["model.name=owner/tiny", "data.path=none"]), quiet=True)
    assert "config.json" in hub.fetched()
    assert not [file for file in hub.fetched() if file.endswith(".safetensors")]


def test_weights_come_after_all_other_files(hub: Hub, tmp_path: Path) -> None:
    hub.add("owner/tiny", files_of(write_model(tmp_path / "model")))
    seen: list[set[str]] = []
    found = model_folder("owner/tiny", validate=lambda folder: seen.append(hub.fetched()))
    (before,) = seen
    assert {"config.json", "tokenizer.json"} <= before
    assert "model.safetensors" not in before
    assert (found.path / "model.safetensors").is_file()
    model_folder("owner/tiny", validate=lambda folder: pytest.fail("nothing is to be fetched"))


def test_gguf_files_alone_are_called_so(hub: Hub, tmp_path: Path) -> None:
    files = {"config.json": "{}", "model-q4_k_m.gguf": b"GGUF", "README.md": "x"}
    hub.add("owner/gguf", files)
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "model.gguf").touch()
    for name in ("owner/gguf", str(tmp_path / "local")):
        with pytest.raises(ModelError, match=r"it holds GGUF files only \(model.*\.gguf\)") as caught:
            model_folder(name)
        assert "give its path" in caught.value.problems[0].hint
    with pytest.raises(ModelError, match="it is not a GGUF file"):
        model_folder(str(tmp_path / "local" / "model.gguf"))
    (tmp_path / "local" / "model.bin").touch()
    with pytest.raises(ModelError, match="is a file, and not a folder"):
        model_folder(str(tmp_path / "local" / "model.bin"))
    assert hub.fetched() == set()


@pytest.mark.parametrize(
    "address",
    [
        "https://huggingface.co/owner/name",
        "https://huggingface.co/owner/name/tree/main",
        "http://hf-mirror.com/owner/name/",
        "hf://owner/name",
    ],
)
def test_an_address_of_a_model_is_answered_with_its_id(address: str, hub: Hub) -> None:
    with pytest.raises(ModelError, match="is an address, and not a model") as caught:
        model_folder(address)
    assert caught.value.problems[0].hint == "write its id on the hub: owner/name"
    assert hub.requests == []


def test_a_download_that_the_disk_cannot_hold_does_not_begin(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = files_of(write_model(tmp_path / "model"))
    hub.add("owner/tiny", files)
    size = len(files["model.safetensors"])
    total = shutil.disk_usage(tmp_path)._replace

    monkeypatch.setattr(client.shutil, "disk_usage", lambda path: total(free=size - 1))
    with pytest.raises(
        ModelError, match=rf"needs {size:,} bytes, and the disk .* has {size - 1:,} free"
    ) as caught:
        model_folder("owner/tiny")
    assert "HF_HOME" in caught.value.problems[0].hint
    assert not any(re.search("safetensors", file) for file in hub.fetched())
    monkeypatch.setattr(client.shutil, "disk_usage", lambda path: total(free=size))
    assert model_folder("owner/tiny").path.is_dir()
