"""A load test of the server with 1, 4 and 16 clients: latency percentiles and tokens per second.

    python -m benchmarks.serve [--model demo/model] [--requests 96] [--tokens 64] [--into docs/serve.md]
    python -m benchmarks.serve --layers 4 --work runs/bench
    python -m benchmarks.serve --hostile [--into docs/serve.md]

Starts `lorafit serve` on the loopback address and sends requests from this process through sockets. Every client
sends one streamed request after the other, each with a different prompt. An answer ends at the token limit or with
the model's stop token. The number of requests is the same for every number of clients, and the server is stopped at
the end. `--layers` uses TinyLlama's shape with this number of layers and random weights (it needs the files beside
the project). `--hostile` measures two honest clients for some seconds, and again during each attack of
benchmarks.serve_attacks, all in under three minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import itertools
import json
import os
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serve_attacks import ATTACKS
from benchmarks.speed import machine, random_model, shared_folder

CLIENTS = (1, 4, 16)
HONEST, QUIET_SECONDS, ATTACK_SECONDS, HOSTILE_TOKENS = 2, 8.0, 15.0, 16
MARKS = {  # of the tables in a page, by `--hostile`
    False: ("<!-- load test -->", "<!-- load test ends -->"),
    True: ("<!-- attacks -->", "<!-- attacks end -->"),
}
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


@contextlib.contextmanager
def served(folder: Path) -> Iterator[tuple[str, str]]:
    """The URL and the token of a server for the model in `folder`."""
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
            yield url, token
        finally:
            server.terminate()
            server.wait(60)


def run(folder: Path, requests: int, most: int) -> list[Measured]:
    """Serve the model in `folder` and measure all numbers of clients."""
    with served(folder) as (url, token):
        asyncio.run(measure(url, token, folder.name, 4, 8, most))  # warm-up
        return [asyncio.run(measure(url, token, folder.name, n, requests, most)) for n in CLIENTS]


async def measure_for(url: str, token: str, model: str, seconds: float, most: int) -> Measured:
    """Send requests from HONEST clients for `seconds`."""
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    numbers = itertools.count()
    replies: list[Reply] = []
    started = time.perf_counter()

    async def client() -> None:
        while time.perf_counter() < started + seconds:
            replies.append(await ask(host, int(port), token, model, next(numbers), most))

    async with asyncio.timeout(MOST_SECONDS):
        await asyncio.gather(*(client() for _ in range(HONEST)))
    return Measured(HONEST, replies, time.perf_counter() - started)


def run_hostile(folder: Path, most: int) -> list[tuple[str, Measured, Measured]]:
    """Serve the model in `folder`; for each attack its name, and the answers before and during it."""
    found: list[tuple[str, Measured, Measured]] = []
    with served(folder) as (url, token):
        port = url.removesuffix("/v1").rpartition(":")[2]
        asyncio.run(measure_for(url, token, folder.name, 2, most))  # warm-up
        for name in ATTACKS:
            quiet = asyncio.run(measure_for(url, token, folder.name, QUIET_SECONDS, most))
            words = [sys.executable, "-m", "benchmarks.serve_attacks", name, port, folder.name]
            with subprocess.Popen(
                words, stdout=subprocess.PIPE, env={**os.environ, "LORAFIT_SERVE_TOKEN": token}
            ) as attack:
                try:
                    assert attack.stdout is not None
                    attack.stdout.readline()
                    during = asyncio.run(measure_for(url, token, folder.name, ATTACK_SECONDS, most))
                finally:
                    attack.kill()
            found.append((name, quiet, during))
    return found


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


def hostile_table(measured: Sequence[tuple[str, Measured, Measured]]) -> str:
    """The times of an answer before and during each attack, as Markdown."""
    lines = [
        "| attack | answers | p50 | before | p99 | before | p99, times before |",
        "| :--- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, quiet, during in measured:
        before, times = ([reply.last for reply in one.replies] for one in (quiet, during))
        cells = [name, str(len(times))]
        for share in (0.5, 0.99):
            cells += [f"{1000 * percentile(values, share):,.0f} ms" for values in (times, before)]
        cells.append(f"{percentile(times, 0.99) / percentile(before, 0.99):.1f}")
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
    parser.add_argument("--hostile", action="store_true", help="honest clients during attacks")
    parser.add_argument("--into", type=Path, help="put the table between the marks of this page")
    arguments = parser.parse_args()
    folder = arguments.model
    if arguments.layers:
        folder = random_model(shared_folder(), arguments.work, arguments.layers)
    facts = machine()
    options = " ".join(["", *sys.argv[1:]]).split(" --into")[0].strip()
    where = (
        f"Measured {datetime.date.today()} on {facts['cpu']}, {facts['cores']} cores, load "
        f"{facts['load_at_start']:.1f} before,\nby `{f'python -m benchmarks.serve {options}'.strip()}`: "
    )
    if arguments.hostile:
        attacked = run_hostile(folder, HOSTILE_TOKENS)
        text = (
            f"{where}{HONEST} clients, answers of at most\n{HOSTILE_TOKENS} tokens. The attackers run on the same "
            f"machine.\n\n{hostile_table(attacked)}\n"
        )
    else:
        measured = run(folder, arguments.requests, arguments.tokens)
        mean = statistics.mean(reply.tokens for one in measured for reply in one.replies)
        text = (
            f"{where}{arguments.requests} answers of {mean:.0f} tokens on average\nper line. The clients run on the "
            f"same machine.\n\n{table(measured)}\n"
        )
    print(text)
    if arguments.into:
        begin, end = MARKS[arguments.hostile]
        page = arguments.into.read_text(encoding="utf-8")
        before, after = page.split(begin)[0], page.split(end)[1]
        arguments.into.write_text(f"{before}{begin}\n{text}{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
