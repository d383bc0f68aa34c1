"""HTTP connections with limits: of the head, of the time to send it and to read the replies, and of their number.

These are hooks of uvicorn's protocol and of the parser h11. At most 4 KiB of heads and chunks, or 64 KiB of a body
whose length is known, are read before other clients have their turn.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from lorafit.serve.errors import ApiError
from lorafit.serve.limits import Limits

HAS_TOKEN = "lorafit.has_token"  # noqa: S105 (key of the state of a request that came with the token)
_READ_BYTES, _READ_BODY_BYTES = 4 * 2**10, 64 * 2**10
_HEAD_END = re.compile(rb"\n\r?\n")
_LENGTH = re.compile(rb"^(?:content-length|transfer-encoding)[ \t]*:([^\n]*)", re.IGNORECASE | re.MULTILINE)


class Connections:
    """The open connections, oldest first. Where they are `limit`, a new one takes the place of another.

    The first to go is the oldest without the token, then the oldest with the token that has no request. Where all have
    requests, the new one is closed.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._open: dict[Connection, None] = {}

    def add(self, new: Connection) -> None:
        """Count `new`, after another connection, or `new`, is closed where there are too many."""
        if len(self._open) >= self.limit:
            strangers = (old for old in self._open if not old.has_token)
            idle = (old for old in self._open if not old.is_busy)
            leaving = next(strangers, None) or next(idle, new)
            leaving.transport.abort()
            self.remove(leaving)
            if leaving is new:
                return
        self._open[new] = None

    def remove(self, connection: Connection) -> None:
        """Forget `connection`."""
        self._open.pop(connection, None)


class _Parser(h11.Connection):
    """Refuses heads that are too large, and bodies whose length is given twice. `fault` is the reason."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(h11.SERVER, limits.head_bytes)
        self._limits = limits
        self.fault = ""

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        if self.their_state is h11.IDLE:
            self.fault = self._fault(self.trailing_data[0])
        elif getattr(
            self._reader, "_reading_trailer", False
        ):  # of a chunked body, which h11 reads as it does a head
            self.fault = self._too_many_lines(self.trailing_data[0])
        if self.fault:
            raise h11.RemoteProtocolError(self.fault)
        return super().next_event()

    @property
    def num_missing(self) -> int:
        """The bytes that are missing of a body whose length is known; 0 for another one."""
        return getattr(self._reader, "_remaining", 0)

    def _fault(self, data: bytes) -> str:
        """What is wrong with the head at the start of `data`, "" for nothing and while it is not complete."""
        end = _HEAD_END.search(data)
        head = data[: end.start() + 1] if end else data
        if len(head) > self._limits.head_bytes:
            return f"the head of the request is larger than {self._limits.head_bytes:,} bytes"
        lengths = _LENGTH.findall(head) if end else []
        if len(lengths) > 1 or any(b"," in length for length in lengths):
            return "the length of the body is given more than once"
        return self._too_many_lines(head)

    def _too_many_lines(self, head: bytes) -> str:
        most = self._limits.headers
        return f"the head of the request has more than {most} lines" if head.count(b"\n") > most else ""


class Connection(H11Protocol, asyncio.BufferedProtocol):
    """One connection of a client."""

    conn: _Parser

    def __init__(self, *args: Any, limits: Limits, connections: Connections, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = _Parser(limits)
        self._limits, self._all = limits, connections
        self._received = memoryview(b"")
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    @property
    def has_token(self) -> bool:
        """Whether the last request came with the token."""
        return self.scope is not None and HAS_TOKEN in self.scope["state"]

    @property
    def is_busy(self) -> bool:
        """Whether a request is in progress."""
        return self.cycle is not None and not self.cycle.response_complete

    def get_buffer(self, sizehint: int) -> memoryview:
        size = max(_READ_BYTES, min(self.conn.num_missing, _READ_BODY_BYTES))
        self._received = memoryview(bytearray(size))
        return self._received

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(self._received[:nbytes]))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self._await_head()
        self._all.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.remove(self)
        _cancel(self._head_timer)
        _cancel(self._write_timer)
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.is_busy and not self.transport.is_closing():
            _cancel(self._head_timer)

    def on_response_complete(self) -> None:
        self._await_head()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self._limits.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        _cancel(self._write_timer)
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Reply that the request is not HTTP, in the form of all errors, and close."""
        error = ApiError(
            400, self.conn.fault or "the request is not valid HTTP", code="invalid_http"
        ).response()
        self._await_head()
        try:
            head = h11.Response(
                status_code=400,
                headers=[*error.raw_headers, (b"connection", b"close")],
                reason=b"Bad Request",
            )
            for event in (head, h11.Data(data=bytes(error.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:  # a reply has begun
            self.transport.abort()
        self.transport.close()

    def _await_head(self) -> None:
        """End the connection unless a whole head arrives in time, or what is left is sent in time."""
        _cancel(self._head_timer)
        self._head_timer = self.loop.call_later(self._limits.head_seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        if self.transport.is_closing() or self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()


def protocol(limits: Limits) -> Callable[..., Connection]:
    """What makes the connections of one server."""
    connections = Connections(limits.connections)

    def make(*args: Any, **kwargs: Any) -> Connection:
        return Connection(*args, limits=limits, connections=connections, **kwargs)

    return make


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
