"""What anybody may take of the server: time without a request, connections, bytes of a head, turns of its loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from tests.effort import is_slower
from tests.serve.live import CONTEXT, Live, live, write_and_load
from tests.serve.shapes import ask, longest_pause, pause_of, request
from tests.waiting import HANGS, Clock

from lorafit.infer.continuous_batch import GeneratedToken
from lorafit.infer.multi_adapter import Models
from lorafit.serve import jobs
from lorafit.serve import limits as limits_module
from lorafit.serve.jobs import TextPiece
from lorafit.serve.limits import Limits, connections_within
from lorafit.serve.responses import ChatFormat, _complete_reply

LONG: dict[str, Any] = {
    "model": "base",
    "prompt": [65],
    "max_tokens": CONTEXT - 48,
    "temperature": 0,
    "logprobs": 20,
    "stream": True,
}
SHORT = {**LONG, "max_tokens": 2, "stream": False}
HASTY = Limits(head_seconds=0.3, body_seconds=0.3, write_seconds=0.3, connections=6)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return write_and_load(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def hasty(models: Models) -> Iterator[Live]:
    with live(models, slots=8, queue=8, limits=HASTY, send_buffer=4096) as running:
        yield running


@pytest.fixture(scope="module")
def patient(models: Models) -> Iterator[Live]:
    """With times that no test sees the end of."""
    limits = Limits(head_seconds=HANGS, body_seconds=HANGS, write_seconds=HANGS, connections=6)
    with live(models, slots=8, queue=8, limits=limits, context=4096) as running:
        yield running


def received(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    content = b""
    with contextlib.suppress(ConnectionResetError), connection:
        while block := connection.recv(65536):
            content += block
    return content


HEALTH = request("/health", method="GET", token=False)
NOT_WHOLE = {
    "nothing": b"",
    "a line": b"GET /health HTTP/1.1\r\n",
    "no end": HEALTH[:-2],
    "nothing after an answer": HEALTH,
    "a line after an answer": HEALTH + b"GET",
    "a body after a refusal": request("/v1/models", "Content-Length: 9", method="GET", token=False) + b"{",
}


@pytest.mark.parametrize("content", NOT_WHOLE.values(), ids=NOT_WHOLE)
def test_a_connection_without_a_whole_head_ends(content: bytes, hasty: Live) -> None:
    answer = received(hasty.connect(content))
    assert answer.startswith(b"HTTP/1.1 ") == (b"\r\n\r\n" in content)


def test_a_head_that_trickles_ends_too(hasty: Live) -> None:
    connection = hasty.connect(b"GET /health HTTP/1.1\r\nX: ")
    done = threading.Event()

    def trickle() -> None:
        with contextlib.suppress(OSError):
            while not done.wait(0.01):
                connection.sendall(b"x")

    thread = threading.Thread(target=trickle)
    thread.start()
    assert received(connection) == b""
    done.set()
    thread.join(HANGS)


def test_a_body_that_trickles_is_given_up(hasty: Live) -> None:
    answer = received(hasty.connect(request("/v1/completions", "Content-Length: 100") + b"{"))
    assert b" 408 " in answer
    assert b"request_timeout" in answer


def test_an_answer_that_nobody_reads_is_given_up(hasty: Live) -> None:
    body = json.dumps(LONG).encode()
    with hasty.connect(request(body=body), receive_buffer=4096):
        hasty.until(lambda: hasty.load()[0] == 1)
        hasty.until(lambda: hasty.load() == (0, 0))
    assert hasty.client.post("/v1/completions", json=SHORT).status_code == 200


def test_an_answer_that_is_read_takes_its_time(hasty: Live) -> None:
    """Longer than all limits: they are for clients that do nothing."""
    started = time.monotonic()
    with hasty.client.stream("POST", "/v1/completions", json=LONG) as reply:
        assert reply.status_code == 200
        for line in reply.iter_lines():
            assert line == "" or line.startswith("data: ")
            if time.monotonic() - started > 3 * HASTY.write_seconds:
                break
        else:
            pytest.fail("the stream ended")


def test_the_owner_is_served_where_strangers_take_all_connections(patient: Live) -> None:
    with (
        contextlib.ExitStack() as open_ones,
        httpx.Client(headers=patient.client.headers, timeout=HANGS) as owner,
    ):
        streaming = open_ones.enter_context(
            owner.stream("POST", f"{patient.url}/v1/completions", json={**LONG, "logprobs": 0})
        )
        lines = streaming.iter_lines()
        next(lines)
        strangers = []
        for number in range(30):
            content = (b"", b"GET / HTTP/1.1\r\n", HEALTH)[number % 3]
            strangers.append(open_ones.enter_context(patient.connect(content)))
            if number % 5 == 0:
                with httpx.Client(headers=patient.client.headers, timeout=HANGS) as other:
                    assert other.get(f"{patient.url}/v1/models").status_code == 200
        assert patient.client.post("/v1/completions", json=SHORT).status_code == 200
        for stranger in strangers[:20]:  # the oldest are closed, and their sockets with them
            received(stranger)
        assert next(line for line in lines if line).startswith("data: ")


def test_where_all_connections_have_requests_of_the_owner_a_new_one_is_closed(patient: Live) -> None:
    body = json.dumps({**LONG, "logprobs": 0}).encode()
    with contextlib.ExitStack() as open_ones:
        for number in range(6):
            connection = open_ones.enter_context(patient.connect(request(body=body)))
            assert connection.recv(9) == b"HTTP/1.1 ", number
        assert received(patient.connect(HEALTH)) == b""
        assert patient.service.scheduler.load()[0] == 6
    patient.until(lambda: patient.service.scheduler.load() == (0, 0))


TWICE = {
    "two equal lengths": ["Content-Length: 2", "Content-Length: 2"],
    "two lengths": ["Content-Length: 2", "content-length: 200"],
    "a list of lengths": ["Content-Length: 2, 2"],
    "a coding beside a length": ["Content-Length: 2", "Transfer-Encoding: chunked"],
    "a length beside a coding": ["Transfer-Encoding: chunked", "Content-Length: 2"],
    "two codings": ["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"],
}


@pytest.mark.parametrize("headers", TWICE.values(), ids=TWICE)
def test_a_length_that_is_given_twice_is_refused_and_ends_the_connection(
    headers: list[str], patient: Live
) -> None:
    answer = received(patient.connect(request("/v1/completions", *headers, body=b"{}")))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"connection: close" in answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"
    assert b"more than once" in answer


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 101, b"more than 100 lines"),
        (b"GET / HTTP/1.1\r\nHost: x\r\na: " + b"b" * 17_000, b"larger than 16,384 bytes"),
        (HEALTH + b"GET / HTTP/1.1\r\n" + b"a:\n" * 101, b"more than 100 lines"),
        (b"nothing that is HTTP\r\n\r\n", b"not valid HTTP"),
        (request("/v1/models", "Transfer-Encoding: chunked") + b"x\r\n", b"not valid HTTP"),
    ],
    ids=["lines", "bytes", "after another", "no HTTP", "a chunk"],
)
def test_a_head_has_few_lines_and_bytes(content: bytes, words: bytes, patient: Live) -> None:
    answer = received(patient.connect(content))
    assert b"HTTP/1.1 400 " in answer
    assert words in answer


def test_an_open_path_takes_no_body(patient: Live) -> None:
    for method in ("GET", "POST"):
        for headers in (["Content-Length: 1"], ["Transfer-Encoding: chunked"]):
            with patient.connect(request("/health", *headers, method=method, token=False)) as connection:
                assert connection.recv(13) == b"HTTP/1.1 400 ", (method, headers)
    with patient.connect(request("/health", "Content-Length: 00", method="GET")) as connection:
        assert connection.recv(13) == b"HTTP/1.1 200 "


def test_the_limits_are_those_of_the_documentation() -> None:
    limits = Limits()
    text = " ".join(Path("docs/serve.md").read_text(encoding="utf-8").split())
    for words in (
        f"{limits.body_bytes // 2**20} MiB, and {limits.body_seconds:.0f} seconds to arrive",
        f"at most {limits.head_bytes // 2**10} KiB and {limits.headers} lines",
        f"whole head ends after {limits.head_seconds:.0f} seconds",
        f"{limits.write_seconds:.0f} seconds",
        f"{limits.connections:,} connections",
    ):
        assert words in text, words


@pytest.mark.parametrize(
    ("soft", "hard", "expected", "raised"),
    [
        (4096, 4096, 1000, None),
        (1024, 1 << 20, 1000, 1640),
        (1024, 1024, 384, None),
        (256, 1400, 760, 1400),
        (100, 100, 12, None),
        (-1, -1, 1000, None),
        (1024, -1, 1000, 1640),
    ],
)
def test_connections_stay_below_the_limit_of_open_files(
    soft: int, hard: int, expected: int, raised: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, values: given.append(values))
    assert connections_within(1000) == expected
    assert given == ([] if raised is None else [(raised, hard)])
    assert limits_module.BACKLOG == 256


MOST = Limits().body_bytes - 70
EXPENSIVE = {  # beside those that tests/serve/test_fuzz.py makes
    "ids": b'{"model": "base", "prompt": [' + b"-1," * (MOST // 3) + b"-1]}",
    "as many ids as allowed": b'{"model": "base", "prompt": [' + b"65," * 199_000 + b"65]}",
    "lists": b'{"model": "base", "prompt": [' + b"[1]," * 49_000 + b"[1]]}",
    "a text of four bytes for each character": b'{"model": "base", "prompt": "'
    + b"a" * MOST
    + '\N{GRINNING FACE}"}'.encode(),
    "keys": b'{"model": "base", ' + b",".join(b'"%d": 0' % index for index in range(49_000)) + b"}",
}


@pytest.mark.parametrize("name", EXPENSIVE)
def test_a_request_holds_the_loop_less_than_50_ms_and_takes_less_than_50_mb(name: str, patient: Live) -> None:
    body = EXPENSIVE[name]
    assert ask(patient, "completions", body) == b"400"
    assert not is_slower(min(pause_of(patient, "completions", body) for _ in range(3)), 0.05)
    tracemalloc.start()
    try:
        ask(patient, "completions", body)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


class LongAnswer:
    """A job whose answer has ended, with the log-probabilities of very many tokens."""

    num_answers, num_prompt_tokens, num_tokens, with_logprobs = 1, 1, 3000, True

    async def pieces(self) -> AsyncIterator[TextPiece]:
        token = GeneratedToken(65, logprob=-1.0, top=tuple((number, -1.0) for number in range(20)))
        yield TextPiece(0, "x", (token,) * self.num_tokens, "stop")


def test_a_long_answer_does_not_hold_the_loop(patient: Live) -> None:
    form = ChatFormat(patient.service.token_texts)
    pauses: list[float] = []
    for _ in range(3):
        with longest_pause(patient) as pause:
            reply = asyncio.run_coroutine_threadsafe(_complete_reply(LongAnswer(), form, {}), patient.loop)  # type: ignore[arg-type]
            content = reply.result(HANGS)
        pauses += pause
    assert len(json.loads(content)["choices"][0]["logprobs"]["content"]) == LongAnswer.num_tokens
    assert not is_slower(min(pauses), 0.05)


@pytest.mark.parametrize("token", [True, False])
def test_small_chunks_and_trailers_do_not_hold_the_loop(patient: Live, token: bool) -> None:
    start = request("/v1/completions", "Transfer-Encoding: chunked", token=token)
    chunks, trailers = b"1\r\nx\r\n" * 20_000 + b"0\r\n\r\n", b"0\r\n" + b"a:\n" * 5_000 + b"\r\n"
    for rest in (chunks, trailers[:4096] + b"\r\n", trailers):
        pauses: list[float] = []
        for _ in range(3):
            with longest_pause(patient) as pause, patient.connect(start + rest) as connection:
                assert connection.recv(9) == b"HTTP/1.1 "
            pauses += pause
        assert not is_slower(min(pauses), 0.05)


def test_a_text_that_cannot_fit_is_refused_before_it_is_rendered(
    patient: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("it was encoded")

    tokenizer = patient.service.models.named["base"].renderer.tokenizer
    monkeypatch.setattr(tokenizer, "encode_batch", never)
    long = "a" * 4_000_000
    for path, body in (
        ("completions", {"prompt": long}),
        ("completions", {"prompt": ["x" * 100_000, "y" * 100_000]}),
        ("chat/completions", {"messages": [{"role": "user", "content": long}]}),
    ):
        refused = patient.client.post(f"/v1/{path}", json={"model": "base", **body})
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        assert re.search(r"has [\d,]+ or more tokens; the context", refused.json()["error"]["message"])


def test_a_long_prompt_does_not_keep_others_waiting(patient: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one long prompt is rendered, short ones are answered; of long ones, only few wait for their turn."""
    going_on, started = threading.Event(), threading.Event()
    by = patient.service._long_renderers["base"]

    def slowly(*_: object) -> list[int]:
        started.set()
        assert going_on.wait(HANGS)
        return [65]

    monkeypatch.setattr(by, "prompt_ids", slowly)
    body = json.dumps({**SHORT, "prompt": "x" + " " * 70_000}).encode()
    monkeypatch.setattr(by.tokenizer, "fewest_tokens", lambda _: 1)
    long_ones = [patient.connect(request(body=body)) for _ in range(4)]
    assert started.wait(HANGS)
    assert patient.client.post("/v1/completions", json={**SHORT, "prompt": "x"}).status_code == 200
    patient.until(lambda: patient.service._num_long == 4)
    assert ask(patient, "completions", body) == b"429"
    going_on.set()
    for connection in long_ones:
        assert connection.recv(13) == b"HTTP/1.1 200 "
        connection.close()


def test_after_a_long_request_that_is_refused_there_is_a_pause(
    patient: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(jobs, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": sleep}))
    monkeypatch.setattr(jobs, "time", Clock(tick=1.0))  # each look at it is a second later
    monkeypatch.setattr(jobs, "_PAUSE", 2.0)
    for size, expected in ((1_000, []), (70_000, [2.0])):
        assert ask(patient, "completions", b"[" * size) == b"400"
        assert slept == expected
    assert jobs._MAX_PAUSE == 5.0
