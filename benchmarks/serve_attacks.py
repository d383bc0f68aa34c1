"""Attacks on a server on the loopback address, for `python -m benchmarks.serve --hostile`.

    python -m benchmarks.serve_attacks NAME PORT MODEL

Runs one attack until it is stopped. The token, which only some attacks have, is in LORAFIT_SERVE_TOKEN. There is no
option for another host.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Awaitable, Callable

HOST = "127.0.0.1"
NUM_SLOW, NUM_OPEN, NUM_UNREAD = 300, 1200, 4
_MOST = 4 * 2**20 - 200


def request(body: bytes) -> bytes:
    """A request for a completion with the token."""
    token = os.environ["LORAFIT_SERVE_TOKEN"]
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


async def slow_heads(port: int, model: str) -> None:
    """Heads of which a byte comes every half second; no token."""

    async def one() -> None:
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection(HOST, port)
                writer.write(b"GET /health HTTP/1.1\r\nX: ")
                while not writer.is_closing():
                    await asyncio.sleep(0.5)
                    writer.write(b"x")
                    await writer.drain()
            await asyncio.sleep(0.1)

    await asyncio.gather(*(one() for _ in range(NUM_SLOW)))


async def connections(port: int, model: str) -> None:
    """More silent connections than the server takes, opened again when they are closed; no token."""

    async def one() -> None:
        while True:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection(HOST, port)
                await reader.read()
                writer.close()
            await asyncio.sleep(1)

    await asyncio.gather(*(one() for _ in range(NUM_OPEN)))


async def _post(port: int, bodies: list[bytes]) -> None:
    """Post `bodies` one after the other, for ever."""
    while True:
        for body in bodies:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection(HOST, port)
                writer.write(request(body))
                await reader.read()
                writer.close()


async def json_shapes(port: int, model: str) -> None:
    """Large bodies of several shapes, that are expensive to read."""
    start = json.dumps({"model": model}).encode()[:-1]
    keys = b",".join(b'"%d":0' % number for number in range(40_000))
    await _post(
        port,
        [
            start + b',"prompt":[' + b"-1," * (_MOST // 3) + b"-1]}",
            start + b',"prompt":[' + b"1," * 190_000 + b"1]}",
            start + b',"prompt":[' + b"[]," * 45_000 + b"[]]}",
            start + b',"prompt":"' + b"\\n" * (_MOST // 2) + b'"}',
            start + b"," + keys + b"}",
            b"[" * _MOST,
        ],
    )


async def big_prompts(port: int, model: str) -> None:
    """Texts of 4 MiB as prompts."""
    await _post(port, [json.dumps({"model": model, "prompt": "a llama " * (_MOST // 8)}).encode()])


async def unread_streams(port: int, model: str) -> None:
    """Long streams that are never read."""
    body = {"model": model, "prompt": "a", "max_tokens": -1, "logprobs": 20, "stream": True}

    async def one() -> None:
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection(HOST, port, limit=1024)
                writer.write(request(json.dumps(body).encode()))
                await writer.wait_closed()
            await asyncio.sleep(0.1)

    await asyncio.gather(*(one() for _ in range(NUM_UNREAD)))


ATTACKS: dict[str, Callable[[int, str], Awaitable[None]]] = {
    "slow heads": slow_heads,
    "filled connections": connections,
    "JSON of every shape": json_shapes,
    "big prompts": big_prompts,
    "unread streams": unread_streams,
}


async def _main(name: str, port: int, model: str) -> None:
    print("started", flush=True)
    await ATTACKS[name](port, model)


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
