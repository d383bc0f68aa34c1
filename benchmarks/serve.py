"""A load test of the server with 1, 4 and 16 clients: latency percentiles and tokens per second.

    python -m benchmarks.serve [--model demo/model] [--requests 96] [--tokens 64] [--into docs/serve.md]
    python -m benchmarks.serve --layers 4 --work runs/bench

Starts `lorafit serve` on the loopback address and sends requests from this process through sockets. Every client
sends one streamed request after the other, each with a different prompt. An answer ends at the token limit or with
the model's stop token. The number of requests is the same for every number of clients, and the server is stopped at
the end. `--layers` uses TinyLlama's shape with this number of layers and random weights (it needs the files beside
the project).
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.speed import machine, random_model, shared_folder

CLIENTS = (1, 4, 16)
BEGIN, END = "<!-- load test -->", "<!-- load test ends -->"
MOST_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer: seconds to its first token and to its end, and its tokens."""

    first: float
    last: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Measured:
    """All answers for one number of clients, and the wall time in seconds."""

    clients: int
    replies: list[Reply]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return sum(reply.tokens for reply in self.replies) / self.seconds


async def ask(host: str, port: int, token: str, model: str, number: int, most: int) -> Reply:
    """Request one streamed completion. Raises RuntimeError if the answer is not complete."""
    body = json.dumps(
        {
            "model": model,
            "prompt": f"{number} is a number, and this is what the teacher said of it: ",
            "max_tokens": most,
            "temperature": 1,
            "seed": number,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {token}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    writer.write(head.encode() + body)
    first, tokens, last_line = 0.0, 0, b""
    async for line in reader:
        if line.startswith(b"data: "):
            first = first or time.perf_counter() - started
            if b'"usage":{' in line:
                tokens = json.loads(line[6:])["usage"]["completion_tokens"]
            last_line = line
    writer.close()
    if last_line.strip() != b"data: [DONE]":
        raise RuntimeError(f"no whole answer: {last_line[:200]!r}")
    return Reply(first, time.perf_counter() - started, tokens)


async def measure(url: str, token: str, model: str, clients: int, requests: int, most: int) -> Measured:
    """Send `requests` requests, `clients` of them at the same time."""
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    numbers = iter(range(requests))
    replies: list[Reply] = []

    async def client() -> None:
        for number in numbers:
            replies.append(await ask(host, int(port), token, model, number, most))

    started = time.perf_counter()
    async with asyncio.timeout(MOST_SECONDS):
        await asyncio.gather(*(client() for _ in range(clients)))
    return Measured(clients, replies, time.perf_counter() - started)


def run(folder: Path, requests: int, most: int) -> list[Measured]:
    """Serve the model in `folder` and measure all numbers of clients."""
    token = secrets.token_urlsafe(24)
    words = [sys.executable, "-m", "lorafit", "serve", str(folder), "--port", "0", "--offline"]
    with subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "LORAFIT_SERVE_TOKEN": token},
    ) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            if not url:
                raise SystemExit("error: the server did not start")
            asyncio.run(measure(url, token, folder.name, 4, 8, most))  # warm-up
            measured = [asyncio.run(measure(url, token, folder.name, n, requests, most)) for n in CLIENTS]
        finally:
            server.terminate()
            server.wait(60)
    return measured


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of `values` that at least `share` of them do not exceed."""
    return sorted(values)[min(len(values) - 1, max(0, round(share * len(values)) - 1))]


def table(measured: Sequence[Measured]) -> str:
    """The figures as Markdown."""
    lines = [
        "| clients | tokens/s | times one client | first token p50 | p95 | answer p50 | p95 | p99 |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in measured:
        firsts, lasts = [r.first for r in one.replies], [r.last for r in one.replies]
        cells = [
            str(one.clients),
            f"{one.tokens_per_second:,.0f}",
            f"{one.tokens_per_second / measured[0].tokens_per_second:.1f}",
            *(f"{1000 * percentile(firsts, share):,.0f} ms" for share in (0.5, 0.95)),
            *(f"{1000 * percentile(lasts, share):,.0f} ms" for share in (0.5, 0.95, 0.99)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("demo/model"))
    parser.add_argument(
        "--layers", type=int, help="use TinyLlama's shape with this number of layers and random weights"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/bench"), help="folder for the random model")
    parser.add_argument("--requests", type=int, default=96, help="requests for each number of clients")
    parser.add_argument("--tokens", type=int, default=64, help="maximum number of tokens per answer")
    parser.add_argument("--into", type=Path, help="put the table between the marks of this page")
    arguments = parser.parse_args()
    folder = arguments.model
    if arguments.layers:
        folder = random_model(shared_folder(), arguments.work, arguments.layers)
    facts = machine()
    measured = run(folder, arguments.requests, arguments.tokens)
    answers = [reply for one in measured for reply in one.replies]
    options = " ".join(["", *sys.argv[1:]]).split(" --into")[0].strip()
    command = f"python -m benchmarks.serve {options}".strip()
    mean = statistics.mean(reply.tokens for reply in answers)
    text = (
        f"Measured {datetime.date.today()} on {facts['cpu']}, {facts['cores']} cores, load "
        f"{facts['load_at_start']:.1f} before,\nby `{command}`: {arguments.requests} answers of {mean:.0f} tokens on "
        f"average\nper line. The clients run on the same machine.\n\n{table(measured)}\n"
    )
    print(text)
    if arguments.into:
        page = arguments.into.read_text(encoding="utf-8")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        arguments.into.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
