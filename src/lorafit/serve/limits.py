"""What the server gives to any client, of time, bytes and connections, before it looks at the request."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

BACKLOG = 256  # connections that the kernel holds for us; asyncio accepts up to as many at a time
_OWN_FILES = 128  # of the model, the cache and the libraries


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes of a body and of a head, lines of a head, seconds until each is complete, and connections.

    `head_seconds` is also the time of a connection without a request. `write_seconds` is the time in which a client
    must read 48 KiB of what waits for it.
    """

    body_bytes: int = 4 * 2**20
    head_bytes: int = 16 * 2**10
    headers: int = 100
    head_seconds: float = 20.0
    body_seconds: float = 20.0
    write_seconds: float = 30.0
    connections: int = 1000


def connections_within(wanted: int) -> int:
    """`wanted`, or as many connections as the process can have open beside its files.

    Raises the soft limit of open files for `wanted` connections as far as the hard limit allows.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    reserved = _OWN_FILES + 2 * BACKLOG  # accepted ones come before room is made for them
    needed = wanted + reserved
    if soft != resource.RLIM_INFINITY and soft < needed:
        limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        if limit > soft:
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
                soft = limit
    return wanted if soft == resource.RLIM_INFINITY else min(wanted, max(soft - reserved, soft // 8, 1))
