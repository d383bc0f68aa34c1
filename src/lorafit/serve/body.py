"""From the bytes of a body to a checked request, with a bound on the time and the memory of every step.

The cost of JSON is in its number of texts, lists, objects and values, which are counted in the bytes before anything is
made of them. Lists are checked up to their first fault (see protocol), and large bodies are read by another thread.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from concurrent.futures import Executor
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from lorafit.serve.errors import ApiError

MAX_PARTS = 50_000  # texts (keys too), lists and objects of a body
MAX_VALUES = 200_000  # elements of all its lists and objects
_SMALL = 16 * 2**10  # bytes that take less time than another thread needs to begin
_MAX_FAULTS = 8  # that a message names
_MAX_NAME = 64  # characters of a key of the client in a message
_JSON = re.compile(r"application/([\w.-]+\+)?json\s*(;.*)?", re.ASCII | re.IGNORECASE)

Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, model: type[Body], executor: Executor) -> Body:
    """The body of `request`. Raises ApiError with what is wrong, and where."""
    if not _JSON.fullmatch(request.headers.get("content-type", "")):
        message = "the body must be JSON: send `Content-Type: application/json`"
        raise ApiError(400, message, code="invalid_request", param="body")
    data = await request.body()
    if len(data) <= _SMALL:
        return parse(data, model)
    return await asyncio.get_running_loop().run_in_executor(executor, parse, data, model)


def parse(data: bytes, model: type[Body]) -> Body:
    """The JSON `data` as a `model`. Raises ApiError."""
    if _has_too_much(data):
        message = f"body: it has more than {MAX_PARTS:,} texts, lists and objects, or more than {MAX_VALUES:,} values"
        raise ApiError(400, message, code="invalid_request", param="body")
    try:
        value = from_json(data, allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        message = f"body: it is not JSON: {error}"
        raise ApiError(400, message, code="invalid_request", param="body") from None
    try:
        return model.model_validate(value)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
    faults = list(dict.fromkeys((_field(fault, value), _words(fault)) for fault in found))
    message = "; ".join(f"{field}: {text}" for field, text in faults[:_MAX_FAULTS])
    if len(faults) > _MAX_FAULTS:
        message += f"; and {len(faults) - _MAX_FAULTS} more"
    raise ApiError(400, message, code="invalid_request", param=faults[0][0])


def short(name: object) -> str:
    """A key of the client for a message."""
    text = str(name)
    return text if len(text) <= _MAX_NAME else f"{text[:_MAX_NAME]}..."


def _has_too_much(data: bytes) -> bool:
    """Whether the JSON `data` has more than MAX_PARTS or MAX_VALUES.

    In bytes that are not JSON the count is right up to the place where the reader of JSON stops.
    """
    if _is_within(data):
        return False  # also with what is inside texts
    if b"\\" in data:
        data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    num_quotes = data.count(b'"')
    if num_quotes > 2 * MAX_PARTS:
        return True
    outside = b"".join(data.split(b'"')[::2])
    return not _is_within(outside, num_quotes // 2)


def _is_within(data: bytes, num_texts: int | None = None) -> bool:
    """Whether `data` has few parts and values, with `num_texts` texts or those between its quotes."""
    texts = data.count(b'"') // 2 if num_texts is None else num_texts
    return texts + data.count(b"[") + data.count(b"{") <= MAX_PARTS and data.count(b",") <= MAX_VALUES


def _field(fault: Mapping[str, Any], body: object) -> str:
    """The place of a fault in `body`. Parts that name an alternative of a type, and no place, are left out."""
    parts: list[str] = []
    for part in fault["loc"]:
        if isinstance(body, dict) and (part in body or fault["type"] == "missing"):
            body = body.get(part)
        elif isinstance(body, list) and isinstance(part, int) and part < len(body):
            body = body[part]
        else:
            continue
        parts.append(short(part))
    return ".".join(parts) or "body"


def _words(fault: Mapping[str, Any]) -> str:
    """What is wrong, without the names that pydantic has for it."""
    match fault["type"]:
        case "extra_forbidden":
            return "this server has no such field"
        case "missing":
            return "it is missing"
        case "model_attributes_type" | "model_type":
            return "it is a JSON object"
    return str(fault["msg"]).removeprefix("Value error, ")
