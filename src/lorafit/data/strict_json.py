"""The JSON decoders of rows: NaN is null, and an object that has a key twice is a fault, not its last value."""

from __future__ import annotations

import json
from typing import Any

_INFINITIES = {"Infinity": float("inf"), "-Infinity": -float("inf")}


class RepeatedKeyError(ValueError):
    """An object has `key` twice."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key `{key[:60]}` is there twice")


class Marked(dict[str, object]):
    """An object with a key twice; the last value counts. `error` says which."""

    error: RepeatedKeyError


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise _error(pairs)
    return value


def _marked(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    marked = Marked(value)
    marked.error = _error(pairs)
    return marked


def _error(pairs: list[tuple[str, object]]) -> RepeatedKeyError:
    keys = [key for key, _ in pairs]
    return RepeatedKeyError(next(key for index, key in enumerate(keys) if key in keys[:index]))


DECODER = json.JSONDecoder(parse_constant=_INFINITIES.get, object_pairs_hook=_unique)
# for what DECODER has refused
MARKING_DECODER = json.JSONDecoder(parse_constant=_INFINITIES.get, object_pairs_hook=_marked)


def mark_in(value: object) -> RepeatedKeyError | None:
    """The error of the first object in a value of MARKING_DECODER that has a key twice."""
    if isinstance(value, Marked):
        return value.error
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((error for part in parts if (error := mark_in(part))), None)


def parse_strict(text: str) -> Any:
    """The value in a JSON text of a row. Raises ValueError: RepeatedKeyError for an object with a key twice."""
    try:
        return DECODER.decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
