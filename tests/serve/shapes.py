"""Bodies of every JSON shape up to the size limit, and what they cost the server's event loop."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st
from tests.serve.live import TOKEN, Live
from tests.waiting import until

from lorafit.serve.limits import Limits
from lorafit.serve.protocol import ChatRequest, CompletionRequest

REQUESTS = {"chat/completions": ChatRequest, "completions": CompletionRequest}
VALID: dict[str, dict[str, Any]] = {
    "chat/completions": {"model": "base", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "completions": {"model": "base", "prompt": [65], "max_tokens": 1},
}
_SMALL_JSON = st.recursive(
    st.sampled_from([None, True, 0, -1, 7, 12345, 1.5, "", "a", "\n", "é", "😀", "user", '"', "\\"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "role", "content", "text", "name"]), inner, max_size=3)
    ),
    max_leaves=6,
)
_FAMILIAR = st.sampled_from(
    [
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]},
        {"type": "text", "text": "x"},
        {"type": "function", "function": {"name": "f", "parameters": {}}},
    ]
)
_PIECES = st.sampled_from(
    [b"a", b" ", b"\\n", b'\\"', b"\\\\", b"\\u00e9", b"\\ud83d\\ude00", b",", b"[{", "é".encode()]
)
_NOT_JSON = st.sampled_from([b"[", b"{", b'{"a":', b'"', b"[[],", b"\\", b"\x00", b"9", b"-", b'["\\",'])
_MOST = Limits().body_bytes


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, bytes]:
    """A path, and a body in which one field is a long list, object, text, number or nest, up to the size limit."""
    path = draw(st.sampled_from(sorted(REQUESTS)))
    fields = sorted(REQUESTS[path].model_fields)
    field = draw(st.sampled_from([*fields, "messages" if "messages" in fields else "prompt", "unknown"]))
    rest = {name: value for name, value in VALID[path].items() if name != field}
    start = json.dumps(rest).encode()[:-1] + f', "{field}": '.encode()
    room = _MOST - len(start) - 20
    unit = json.dumps(draw(_SMALL_JSON | _FAMILIAR), ensure_ascii=draw(st.booleans())).encode()
    number = draw(st.sampled_from([100, 9_990, 45_000, 180_000, _MOST]))

    def repeated(part: bytes, end: bytes = b"") -> bytes:
        return part * min(number, (room - len(end)) // len(part)) + end

    match draw(st.integers(0, 6)):
        case 0 | 1:
            value = b"[" + repeated(unit + b",", unit + b"]")
        case 2:
            value = b"[[" + repeated(unit + b",", unit + b"]]")
        case 3:
            count = min(number, room // (len(unit) + 12))
            value = b"{" + b",".join(b'"%d":%s' % (index, unit) for index in range(count)) + b"}"
        case 4:
            value = b'"' + repeated(draw(_PIECES), b'"')
        case 5:
            depth = min(number, room // 2)
            value = b"[" * depth + b"]" * depth
        case _:
            return path, repeated(draw(_NOT_JSON))
    return path, start + value + b"}"


@contextlib.contextmanager
def longest_pause(there: Live) -> Iterator[list[float]]:
    """The most seconds of processor time of this process for which the server's loop had no turn while the block ran.

    Not wall time: a busy machine may stop the process for as long as it likes.
    """
    pauses = [0.0]
    running = True

    def tick(before: float) -> None:
        now = time.process_time()
        pauses.append(now - before)
        if running:
            there.loop.call_later(0.001, tick, now)

    there.loop.call_soon_threadsafe(lambda: tick(time.process_time()))
    until(lambda: len(pauses) > 1)
    found: list[float] = []
    try:
        yield found
        num = len(pauses)
        until(lambda: len(pauses) > num)
    finally:
        running = False
        found.append(max(pauses))


def request(
    path: str = "/v1/completions", *headers: str, body: bytes = b"", method: str = "POST", token: bool = True
) -> bytes:
    """A request as bytes, with `headers` in place of the length where they are given."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    lines += [f"Authorization: Bearer {TOKEN}"] * token
    lines += headers or [f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


def ask(there: Live, path: str, body: bytes) -> bytes:
    """The status of the answer."""
    with there.connect() as connection:
        connection.sendall(request(f"/v1/{path}", body=body))
        answer = connection.recv(65536)
        while answer and b"\r\n\r\n" not in answer:
            answer += connection.recv(65536)
        return answer[9:12]


def pause_of(there: Live, path: str, body: bytes) -> float:
    """The longest pause while `body` is answered or refused."""
    with longest_pause(there) as pause:
        ask(there, path, body)
    return pause[0]


_WIRE = st.one_of(
    st.sampled_from(
        [
            request("/health", method="GET", token=False),
            request("/v1/models", method="GET"),
            request("/v1/completions", "Content-Length: 100") + b"{",
            request("/v1/completions", "Transfer-Encoding: chunked", body=b"2\r\n{}\r\n0\r\n\r\n"),
            request("/v1/completions", "Content-Length: 2", "Content-Length: 2", body=b"{}"),
            request("/health", "Content-Length: 2", "Transfer-Encoding: chunked", body=b"{}"),
            request("/v1/completions", "Expect: 100-continue", "Content-Length: 2"),
            b"GET /health HTTP/1.1\r\nHost: localhost\r\n",
            b"GET http://localhost/health HTTP/1.0\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"Connection: Upgrade\r\nUpgrade: websocket\r\n",
            b"Transfer-Encoding: gzip, chunked\r\n",
            b"X: y\r\n" * 120,
            b"x" * 20_000,
            b"5\r\nhello\r\n",
            b"ffffffffffffffffff\r\n",
            b"0\r\nTrailer: x\r\n",
            b"\r\n",
            b"\n",
            b" folded\r\n",
        ]
    ),
    st.binary(max_size=40),
)
wires = st.lists(_WIRE, max_size=8)
