"""Who may ask, and how much: Host, Origin, token, size and pace of a request, before anything reads it."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
from collections.abc import Iterable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorafit.serve.errors import ApiError

OPEN_PATHS = ("/health",)
BODY_SECONDS = 20.0
_HOST = re.compile(
    r"(?:\[([0-9a-fA-F:.]+)\]|([\w.-]+))(?::\d{1,5})?", re.ASCII
)  # [address] or name, and a port


class Guard:
    """Lets requests through to `app` that come from where they should, with the token, in whole and soon enough.

    A page of a foreign site can make a browser send requests here, and by changing what its name resolves to even
    read the replies; both say so in Host and Origin. `hosts` are the names that this server goes by; with `any_address`
    also every plain IP address, which no foreign site can pretend to be.
    """

    def __init__(
        self, app: ASGIApp, *, token: str, hosts: Iterable[str], any_address: bool, max_bytes: int
    ) -> None:
        self.app = app
        self._token = token.encode()
        self._hosts = {host.lower() for host in hosts}
        self._any_address = any_address
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check(scope)
            body = await self._body(scope, receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if body is None:
            return  # the client has gone
        await self.app(scope, _replay(body, receive), send)

    def _check(self, scope: Scope) -> None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            raise ApiError(
                403, "this server does not go by that host name", code="host_not_allowed", param="Host"
            )
        for name, value in headers:
            if name == b"origin" and value.decode("latin-1") not in _same_site(hosts[0]):
                raise ApiError(
                    403, "pages of other sites may not ask", code="origin_not_allowed", param="Origin"
                )
        if scope["path"] in OPEN_PATHS:
            return
        given = [value for name, value in headers if name == b"authorization"]
        kind, _, token = (given[0] if len(given) == 1 else b"").partition(b" ")
        if not hmac.compare_digest(token.strip(), self._token) or kind.lower() != b"bearer":
            raise ApiError(
                401,
                "the token is missing or wrong: send `Authorization: Bearer TOKEN`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _is_ours(self, host: str) -> bool:
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = (match[1] or match[2]).lower()
        return name in self._hosts or (self._any_address and _is_address(name))

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        too_large = ApiError(
            413, f"the request is larger than {self._max_bytes:,} bytes", code="request_too_large"
        )
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > self._max_bytes:
                raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > self._max_bytes:
                        raise too_large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(408, "the request did not arrive in time", code="request_timeout") from None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _same_site(host: str) -> tuple[str, str]:
    return f"http://{host}", f"https://{host}"


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read, then what else comes."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> dict[str, Any]:
        return dict(messages.pop()) if messages else dict(await receive())

    return next_message
