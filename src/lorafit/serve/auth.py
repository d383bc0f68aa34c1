"""Checks Host, Origin, token, size and arrival time of each request, before the application reads it."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorafit.serve.connection import HAS_TOKEN
from lorafit.serve.errors import ApiError
from lorafit.serve.limits import Limits

OPEN_PATHS = ("/health",)
_HOST = re.compile(
    r"(?:\[([0-9a-fA-F:.]+)\]|([\w.-]+))(?::\d{1,5})?", re.ASCII
)  # [address] or name, and a port


class Guard:
    """ASGI middleware: `app` gets only requests with an allowed Host and Origin, the token, and a complete body.

    A page of another site can make a browser send requests here. With DNS rebinding it can also read the replies. Host
    and Origin reveal both. `hosts` are the names of this server. With `any_address`, all plain IP addresses are
    allowed too, because no site can use them for DNS rebinding. A browser may send the token in `cookie`, which is no
    cookie where it is "". `open_paths` need no token and take no body. `allow` says how a host `{name}` is allowed.
    `refuse` makes the reply to other requests.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str,
        hosts: Iterable[str],
        any_address: bool,
        limits: Limits,
        cookie: str = "",
        open_paths: Collection[str] = OPEN_PATHS,
        allow: str = ": start it with `lorafit serve ... --allow-host {name}` to allow `{name}`",
        refuse: Callable[[ApiError], Response] = ApiError.response,
    ) -> None:
        self.app = app
        self._cookie, self._open_paths, self._allow, self._refuse = cookie, open_paths, allow, refuse
        self._token = token.encode()
        self._hosts = {host.lower() for host in hosts}
        self._any_address = any_address
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check(scope)
            body = await self._body(scope, receive)
        except ApiError as error:
            await self._refuse(error)(scope, receive, send)
            return
        if body is None:
            return  # the client disconnected
        await self.app(scope, _replay(body, receive), send)

    def _check(self, scope: Scope) -> None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
        if len(hosts) != 1 or not self._is_allowed(hosts[0]):
            message = "the host name is not one of this server"
            if len(hosts) == 1 and (match := _HOST.fullmatch(hosts[0])):
                name = match[1] or match[2]
                message += self._allow.format(name=name)
            raise ApiError(403, message, code="host_not_allowed", param="Host")
        for name, value in headers:
            if name == b"origin" and value.decode("latin-1") not in (
                f"http://{hosts[0]}",
                f"https://{hosts[0]}",
            ):
                message = "requests from pages of other sites are not allowed"
                raise ApiError(403, message, code="origin_not_allowed", param="Origin")
        if scope["path"] in self._open_paths:
            if any(
                name == b"transfer-encoding" or (name == b"content-length" and value.strip(b"0"))
                for name, value in headers
            ):
                raise ApiError(400, f"{scope['path']} takes no body", code="invalid_request", param="body")
            return
        if not (self._has_header(headers) or self._has_cookie(headers, scope["method"])):
            raise ApiError(
                401,
                "the token is missing or wrong: send `Authorization: Bearer TOKEN`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        scope.setdefault("state", {})[HAS_TOKEN] = True

    def _has_header(self, headers: list[tuple[bytes, bytes]]) -> bool:
        values = [value for name, value in headers if name == b"authorization"]
        kind, _, token = (values[0] if len(values) == 1 else b"").partition(b" ")
        return hmac.compare_digest(token.strip(), self._token) and kind.lower() == b"bearer"

    def _has_cookie(self, headers: list[tuple[bytes, bytes]], method: str) -> bool:
        """Whether a page of this server sends the token: browsers send cookies with requests of other pages too."""
        if not self._cookie:
            return False
        sites = {value for name, value in headers if name == b"sec-fetch-site"}
        has_origin = any(name == b"origin" for name, _ in headers)  # it was compared before
        if sites - {b"same-origin", b"none"} or (method not in ("GET", "HEAD") and not has_origin):
            return False
        pairs = (pair.strip() for name, value in headers if name == b"cookie" for pair in value.split(b";"))
        start = f"{self._cookie}=".encode()
        values = [pair.removeprefix(start) for pair in pairs if pair.startswith(start)]
        return len(values) == 1 and hmac.compare_digest(values[0], self._token)

    def _is_allowed(self, host: str) -> bool:
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = (match[1] or match[2]).lower()
        return name in self._hosts or (self._any_address and _is_address(name))

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        most = self._limits.body_bytes
        message = f"the request is larger than {most:,} bytes"
        too_large = ApiError(413, message, code="request_too_large")
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > most:
                raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    event = await receive()
                    if event["type"] == "http.disconnect":
                        return None
                    body += event.get("body", b"")
                    if len(body) > most:
                        raise too_large
                    if not event.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(408, "the request did not arrive in time", code="request_timeout") from None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns the body that was read, then all later messages."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> dict[str, Any]:
        return dict(messages.pop()) if messages else dict(await receive())

    return next_message
