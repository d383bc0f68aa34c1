"""A studio without any network, in a namespace of its own: `python -m tests.studio.alone FOLDER MODEL ROWS`.

It brings the loopback up, asks for every page and all that they load, and trains a run on a folder of this machine.
"""

from __future__ import annotations

import errno
import re
import socket
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urljoin

import httpx
from tests.waiting import HANGS, until

from lorafit.serve.listening import Server
from lorafit.studio.server import run_studio


def bring_loopback_up() -> None:
    """What `ip link set lo up` does; nothing else has a route then."""
    import fcntl

    up, running, set_flags = 0x1, 0x40, 0x8914  # IFF_UP, IFF_RUNNING, SIOCSIFFLAGS
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        fcntl.ioctl(one, set_flags, struct.pack("16sh14x", b"lo", up | running))
    with socket.socket() as other:
        assert other.connect_ex(("192.0.2.1", 443)) == errno.ENETUNREACH


def visit(client: httpx.Client, queries: list[str]) -> set[str]:
    """The paths of all pages and files that `queries` and what they link to lead to; each of them answers."""
    waiting, seen = [*queries], set[str]()
    while waiting:
        address = waiting.pop(0)  # `queries` first: of a path with several queries, one is enough
        path = address.partition("?")[0]
        if path in seen and address not in queries:
            continue
        queries = [query for query in queries if query != address]
        seen.add(path)
        reply = client.get(address)
        assert reply.status_code == 200, (address, reply.text)
        for link in re.findall(r'(?:href|src|data-live)="([^"]+)"', reply.text):
            if not link.startswith(("data:", "#")):
                target = urljoin(f"{client.base_url}{address}", link.replace("&amp;", "&"))
                assert target.startswith(str(client.base_url)), target
                waiting.append(target.removeprefix(str(client.base_url).rstrip("/")).partition("#")[0])
    return seen


def main(folder: Path, model: str, rows: str) -> None:
    """Exits with 0 where all of it works."""
    bring_loopback_up()
    shown: list[str] = []
    servers: list[Server] = []
    start: Callable[..., None] = run_studio
    threading.Thread(
        target=start, args=(folder, 0), kwargs={"show": shown.append, "ready": servers.append}, daemon=True
    ).start()
    until(lambda: shown)
    base, _, token = shown[0].partition("/open?token=")
    headers = {"Authorization": f"Bearer {token}"}
    with httpx.Client(base_url=base, headers=headers, timeout=HANGS, trust_env=False) as client:
        fields = {"name": "own", "model.name": model, "data.path": rows, "train.max_steps": "2"}
        fields |= {"model.dtype": "float32", "model.device": "cpu", "lora.rank": "2", "run.verify": "false"}
        assert client.post("/new/check", data=fields).json()["errors"] == []
        job = client.post("/new", data={**fields, "act": "start"}).headers["location"]
        until(lambda: "data-over" in client.get(job).text)
        assert "exit code 0" in client.get(job).text, client.get(job).text
        (run,) = re.findall(r'href="(/runs/[^"]+)"', client.get(job).text)
        seen = visit(
            client, ["/", job, f"/compare?run={run[6:]}", f"/data?data.path={rows}&model.name={model}"]
        )
        expected = {run, f"{run}/live", f"{run}/export", "/new", "/talk", "/list", "/static/page.js"}
        assert expected <= seen, expected - seen
        assert ">finished<" in client.get(run).text
        assert 'class="trained"' in client.get(f"/data?data.path={rows}&model.name={model}").text
    servers[0].should_exit = True


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
