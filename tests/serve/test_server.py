"""Who may ask the server and how much; who gives up frees a slot; what happens when too many ask, and at the end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from tests.serve.live import CONTEXT, TOKEN, Live, live, write_and_load, write_models
from tests.tiny_models import write_model
from tests.waiting import HANGS, Clock

from lorafit.errors import ConfigError
from lorafit.infer.multi_adapter import Models, check_context, load_many
from lorafit.serve.auth import Guard
from lorafit.serve.limits import Limits
from lorafit.serve.listening import Address, Server, find_token, listen

ENDLESS: dict[str, Any] = {
    "model": "base",
    "prompt": [65],
    "max_tokens": CONTEXT - 48,
    "temperature": 0,
    "stream": True,
}
SHORT: dict[str, Any] = {**ENDLESS, "max_tokens": 2, "stream": False}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return write_and_load(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def there(models: Models) -> Iterator[Live]:
    with live(models, slots=2, queue=2, hosts=("llama.example",)) as running:
        yield running


def error_of(reply: httpx.Response) -> dict[str, Any]:
    (name, error), *more = reply.json().items()
    assert (name, more) == ("error", [])
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


@pytest.mark.parametrize(
    "header",
    [None, "", TOKEN, f"Basic {TOKEN}", "Bearer", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer é"],
)
def test_nothing_is_told_without_the_token(header: str | None, there: Live) -> None:
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    with httpx.Client(base_url=there.url, timeout=HANGS) as stranger:
        for path in ("/v1/models", "/openapi.json", "/v1/nothing", "/docs"):
            reply = stranger.get(path, headers=headers)
            assert reply.status_code == 401
            assert error_of(reply)["code"] == "invalid_api_key"
            assert reply.headers["www-authenticate"] == "Bearer"
        assert stranger.post("/v1/completions", headers=headers, json=SHORT).status_code == 401
        assert stranger.get("/health", headers=headers).json() == {"status": "ok", "active": 0, "waiting": 0}


def test_a_token_may_not_be_sent_twice(there: Live) -> None:
    twice = [("Authorization", f"Bearer {TOKEN}"), ("Authorization", "Bearer other")]
    assert httpx.get(f"{there.url}/v1/models", headers=twice, timeout=HANGS).status_code == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:9", 200),
        ("localhost", 200),
        ("LocalHost:8000", 200),
        ("[::1]:8000", 200),
        ("llama.example", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("evil.localhost", 403),
        ("evil-localhost", 403),
        ("10.0.0.7", 403),
        ("[::2]", 403),
        ("", 403),
        ("a@localhost:x", 403),
    ],
)
def test_only_names_of_this_server_are_answered(host: str, status: int, there: Live) -> None:
    reply = there.client.get("/v1/models", headers={"Host": host})
    assert reply.status_code == status
    if status == 403:
        assert error_of(reply)["code"] == "host_not_allowed"
        is_name = "@" not in host and host != ""
        assert (f"--allow-host {host.strip('[]')}" in error_of(reply)["message"]) == is_name


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:8000", 200),
        ("http://localhost:3000", 403),
        ("https://evil.example", 403),
        ("null", 403),
    ],
)
def test_pages_of_other_sites_are_not_answered(origin: str, status: int, there: Live) -> None:
    reply = there.client.get("/v1/models", headers={"Host": "localhost:8000", "Origin": origin})
    assert reply.status_code == status
    if status == 403:
        assert error_of(reply)["code"] == "origin_not_allowed"
    assert "access-control-allow-origin" not in reply.headers


def test_a_server_on_all_addresses_takes_any_address_but_no_foreign_name() -> None:
    def is_ours(host: str, any_address: bool) -> bool:
        checked = Guard(None, token="x", hosts=["localhost"], any_address=any_address, limits=Limits())  # type: ignore[arg-type]
        return checked._is_allowed(host)

    assert is_ours("10.0.0.7:8000", any_address=True)
    assert not is_ours("10.0.0.7:8000", any_address=False)
    assert not is_ours("evil.example", any_address=True)


def raw(there: Live, content: bytes, timeout: float = HANGS) -> bytes:
    """What comes back for these bytes until the server closes, or nothing more comes."""
    host, port = there.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=timeout) as connection:
        connection.sendall(content)
        received = b""
        while b"}" not in received and (block := connection.recv(65536)):
            received += block
        return received


def head(length: object, more: str = "") -> bytes:
    return (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n{more}\r\n"
    ).encode()


def test_too_much_is_refused_before_it_is_read(there: Live) -> None:
    assert b" 413 " in raw(there, head(Limits().body_bytes + 1))
    chunked = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    block = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    assert b" 413 " in raw(there, chunked + block * (Limits().body_bytes // 0x10000 + 1))
    assert there.client.post("/v1/completions", json=SHORT).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"model": "base", "prompt": NaN}',
        b'{"model": "base", "prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "base", "prompt": "\\ud800"}',
        b'{"model": "base", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model": "base", "prompt": [260]}',
        b'{"model": "base", "prompt": [-1]}',
        b'{"model": "base", "prompt": [1, [2]]}',
        b'{"model": "base", "prompt": []}',
        b'{"model": "base", "prompt": "x", "temperature": 1e999}',
    ],
    ids=lambda body: body[:40].decode("latin-1"),
)
def test_bodies_that_are_no_request_are_refused(body: bytes, there: Live) -> None:
    reply = there.client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400
    assert error_of(reply)["type"] == "invalid_request_error"


def test_a_form_is_no_request(there: Live) -> None:
    """What a page of another site can send without being asked first."""
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        reply = there.client.post(
            "/v1/completions", content=json.dumps(SHORT), headers={"Content-Type": kind}
        )
        assert reply.status_code == 400


def test_a_path_that_is_not_there_has_an_error_of_the_same_shape(there: Live) -> None:
    assert error_of(there.client.get("/v1/nothing"))["type"] == "not_found_error"
    wrong = there.client.get("/v1/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert "message" in error_of(wrong)


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot_at_once(is_stream: bool, there: Live) -> None:
    host, port = there.url.removeprefix("http://").split(":")
    body = json.dumps({**ENDLESS, "stream": is_stream, "n": 2}).encode()
    connection = socket.create_connection((host, int(port)), timeout=HANGS)
    connection.sendall(head(len(body)) + body)
    there.until(lambda: there.load()[0] == 2)
    if is_stream:
        assert b" 200 " in connection.recv(100)
    connection.close()
    there.until(lambda: there.load() == (0, 0))
    assert len(there.batch) == 0
    assert there.client.post("/v1/completions", json=SHORT).status_code == 200


def test_when_too_many_wait_the_next_is_told_when_to_come_again(there: Live) -> None:
    url, headers = f"{there.url}/v1/completions", there.client.headers
    with (
        httpx.Client(headers=headers, timeout=HANGS) as busy,
        busy.stream("POST", url, json={**ENDLESS, "n": 2}) as one,
    ):
        events = one.iter_lines()
        next(events)
        done: list[int] = []
        waiting = threading.Thread(
            target=lambda: done.append(
                httpx.post(url, json={**SHORT, "n": 2}, headers=headers, timeout=HANGS).status_code
            )
        )
        waiting.start()
        there.until(lambda: there.load() == (2, 2))
        full = there.client.post("/v1/completions", json=SHORT)
        assert full.status_code == 429
        assert error_of(full)["code"] == "queue_full"
        assert 1 <= int(full.headers["retry-after"]) <= 60
        assert not done
    waiting.join(HANGS)
    assert done == [200]
    assert (
        there.client.post("/v1/completions", json={**SHORT, "n": 5}).status_code == 429
    )  # never fits at once


def test_time_runs_out(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock, of which there is one a pass, is a second later."""
    clock = Clock(tick=1.0)
    monkeypatch.setattr("lorafit.infer.scheduler.time", clock)
    monkeypatch.setattr("lorafit.serve.jobs.time", clock)
    with live(models, slots=1, queue=4, timeout=30) as hasty:
        late = hasty.client.post("/v1/completions", json={**ENDLESS, "stream": False})
        assert (late.status_code, error_of(late)["code"]) == (504, "timeout")
        with hasty.client.stream("POST", "/v1/completions", json=ENDLESS) as reply:
            assert reply.status_code == 200
            lines = [line for line in reply.iter_lines() if line]
        assert len(lines) > 20
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        assert "[DONE]" not in lines[-1]
        assert hasty.load() == (0, 0)


def test_an_error_of_ours_is_told_as_such_and_the_server_goes_on(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    with live(models) as running:
        with monkeypatch.context() as patch:
            patch.setattr(running.batch, "add", lambda *_: 1 / 0)
            failed = running.client.post("/v1/completions", json=SHORT)
        assert (failed.status_code, error_of(failed)["type"]) == (500, "server_error")
        assert running.client.post("/v1/completions", json=SHORT).status_code == 200


def test_the_openapi_document_says_what_is_there(there: Live) -> None:
    document = there.client.get("/openapi.json").json()
    assert {path: list(methods) for path, methods in document["paths"].items()} == {
        "/health": ["get"],
        "/v1/models": ["get"],
        "/v1/models/{model}": ["get"],
        "/v1/chat/completions": ["post"],
        "/v1/completions": ["post"],
    }
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert chat["security"] == [{"token": []}]
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert "422" not in json.dumps(list(chat["responses"]))
    assert document["paths"]["/health"]["get"]["security"] == []


def test_tokens_from_the_environment_must_be_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORAFIT_SERVE_TOKEN", raising=False)
    one, two = find_token(), find_token()
    assert one.is_new
    assert len(one.value) >= 40
    assert one != two
    monkeypatch.setenv("LORAFIT_SERVE_TOKEN", "a-good-long-token")
    assert (find_token().value, find_token().is_new) == ("a-good-long-token", False)
    for bad in ("", "short", "with a blank in it", "nön-äscii-tökens-hëre", "x" * 600):
        monkeypatch.setenv("LORAFIT_SERVE_TOKEN", bad)
        with pytest.raises(ConfigError, match="is not a token") as refused:
            find_token()
        assert not bad or bad not in str(refused.value)


def test_an_address_that_is_taken_is_an_error_with_a_hint() -> None:
    with listen(Address("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
            listen(Address("127.0.0.1", port))
    with pytest.raises(ConfigError, match="cannot listen on no.such.host.invalid"):
        listen(Address("no.such.host.invalid", 0))


def test_names_and_bases_are_checked_together(tmp_path: Path, models: Models) -> None:
    one, two = write_models(tmp_path / "a")
    named = load_many([f"x={one}", two], device="cpu").named
    assert list(named) == ["x", "two", "base"]
    assert [entry.adapter for entry in named.values()] == ["x", "two", None]
    assert list(load_many([str(tmp_path / "a" / "base")], device="cpu").named) == ["base"]
    with pytest.raises(ConfigError, match="two models have the name `one`"):
        load_many([one, one], device="cpu")
    other = write_models(tmp_path / "b")[0]
    write_model(tmp_path / "b" / "base", seed=1, max_position_embeddings=CONTEXT)
    base = str(tmp_path / "a" / "base")
    with pytest.raises(ConfigError) as refused:
        load_many([one, f"other={other}", f"plain={base}"], device="cpu")
    text = str(refused.value)
    assert "the adapter was made on another base model" in text
    assert other in text
    assert "`plain` is a base model" in text
    assert check_context(None, models.network) == 4096
    assert check_context(9, models.network) == 9
    with pytest.raises(ConfigError, match="more than the model can read"):
        check_context(CONTEXT + 1, models.network)


@contextlib.contextmanager
def process(folder: Path, *words: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`lorafit serve` as a process, and its URL."""
    with subprocess.Popen(
        [sys.executable, "-m", "lorafit", "serve", "--port", "0", "--device", "cpu", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, **environment},
    ) as started:
        try:
            assert started.stdout is not None
            url = started.stdout.readline().strip()
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1", url), started.communicate()
            yield started, url
        finally:
            started.kill()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_process_well_and_answers_under_way_are_finished(
    number: signal.Signals, tmp_path: Path
) -> None:
    write_models(tmp_path)
    given = {"LORAFIT_SERVE_TOKEN": "0123456789abcdef-secret"} if number == signal.SIGTERM else {}
    with process(tmp_path, "one", "two=two", "--kept-prompts", "3", **given) as (server, url):
        assert server.stderr is not None
        lines = list(iter(server.stderr.readline, "stop     Ctrl-C\n"))
        assert next(line for line in lines if line.startswith("memory")).endswith("3 MB of kept prompts\n")
        (shown,) = [line.split(maxsplit=1)[1].strip() for line in lines if line.startswith("token")]
        token = next(iter(given.values()), shown)
        headers = {"Authorization": f"Bearer {token}"}
        names = [
            model["id"] for model in httpx.get(f"{url}/models", headers=headers, timeout=HANGS).json()["data"]
        ]
        assert names == ["one", "two", "base"]
        ask = {**ENDLESS, "max_tokens": 300}
        with httpx.stream("POST", f"{url}/completions", json=ask, headers=headers, timeout=HANGS) as reply:
            events = reply.iter_lines()
            next(events)
            server.send_signal(number)
            rest = [line for line in events if line]
        assert rest[-1] == "data: [DONE]"
        assert len(rest) > 299
        assert server.wait(HANGS) == 0
        said = server.stderr.read()
        assert "Traceback" not in said
        assert token not in said  # shown once, and not at all where it was given
        assert given == {} or shown == "the one in LORAFIT_SERVE_TOKEN"


@pytest.mark.parametrize("ignored", [signal.SIGINT, signal.SIGTERM])
def test_the_server_leaves_a_signal_ignored_that_was_ignored_before(ignored: signal.Signals) -> None:
    server = Server(uvicorn.Config(lambda: None), lambda: None)
    before = signal.signal(ignored, signal.SIG_IGN)
    try:
        with server.capture_signals():
            handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        assert handlers.pop(ignored) is signal.SIG_IGN
        assert set(handlers.values()) == {server.handle_exit}
        assert signal.getsignal(ignored) is signal.SIG_IGN
    finally:
        signal.signal(ignored, before)


def test_a_disconnect_is_seen_within_a_pass_even_while_others_are_answered(there: Live) -> None:
    url, headers = f"{there.url}/v1/completions", there.client.headers
    with (
        httpx.Client(headers=headers, timeout=HANGS) as steady,
        steady.stream("POST", url, json=ENDLESS) as one,
    ):
        lines = one.iter_lines()
        next(lines)
        with (
            httpx.Client(headers=headers, timeout=HANGS) as fickle,
            fickle.stream("POST", url, json=ENDLESS) as two,
        ):
            events = two.iter_lines()
            next(events)
            assert there.load() == (2, 0)
        there.until(lambda: there.load() == (1, 0))
        assert next(line for line in lines if line).startswith("data: ")
