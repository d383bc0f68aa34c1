"""Exports go to the hub in one commit, privately, and only with a token from the environment or the login."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants
from tests.hub.stub import GOOD_TOKEN, STRANGER_TOKEN, Hub

from lorafit.errors import ConfigError, RunError
from lorafit.export.push import push


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
    huggingface_hub.close_session()
    yield hub
    huggingface_hub.close_session()
    hub.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "export"
    made.mkdir()
    (made / "README.md").write_text("---\ntags: [lora]\n---\n# it\n")
    (made / "model.gguf").write_bytes(b"GGUF" + bytes(range(256)))
    (made / "parity.json").write_text('{"verified": true}')
    return made


def held(hub: Hub, route: str) -> dict[str, bytes]:
    repository = hub.repositories[route]
    return repository.commits[repository.refs["main"]]


def test_every_file_arrives_in_one_commit_that_only_the_owner_sees(hub: Hub, folder: Path) -> None:
    address = push(folder, "me/tuned")
    assert address == f"{hub.url}/me/tuned"
    files = held(hub, "me/tuned")
    sent = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name: files[name] for name in sent} == sent
    assert hub.repositories["me/tuned"].is_private
    assert len([request for request in hub.requests if "/commit/" in request]) == 1


def test_pushing_again_goes_to_the_same_place(hub: Hub, folder: Path) -> None:
    push(folder, "me/tuned")
    (folder / "model.gguf").write_bytes(b"GGUF again")
    push(folder, "me/tuned")
    assert held(hub, "me/tuned")["model.gguf"] == b"GGUF again"


def test_public_only_when_asked(hub: Hub, folder: Path) -> None:
    push(folder, "me/open", private=False)
    assert not hub.repositories["me/open"].is_private
    before = dict(held(hub, "me/open"))
    (folder / "secret.txt").write_text("not for all")
    with pytest.raises(RunError, match="everybody can see it") as caught:
        push(folder, "me/open")
    assert "--public" in str(caught.value)
    assert held(hub, "me/open") == before


def test_without_a_token_nothing_is_sent(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match="needs a token"):
        push(folder, "me/tuned")
    assert hub.requests == []


def test_a_refusal_says_that_the_export_is_on_the_disk(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", STRANGER_TOKEN)
    with pytest.raises(RunError, match="the hub refused") as caught:
        push(folder, "me/tuned")
    assert "needs write access" in str(caught.value)
    assert STRANGER_TOKEN not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
    hub.failing_on = "commit"
    with pytest.raises(RunError, match=r"the hub refused \(503\)"):
        push(folder, "me/tuned")
    with pytest.raises(ConfigError, match="not an id of the hub"):
        push(folder, "not an id")
    hub.close()
    with pytest.raises(RunError, match="was not pushed"):
        push(folder, "me/other")
