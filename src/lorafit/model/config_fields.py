"""Reads typed fields of a config.json and collects all problems."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorafit.errors import ModelError, Problem


class Fields:
    """The fields of one config.json. `problems` holds what is wrong with them."""

    def __init__(self, raw: Mapping[str, Any], place: str) -> None:
        self.raw, self.place = raw, place
        self.problems: list[Problem] = []

    def wrong(self, name: str, why: str, hint: str = "") -> None:
        """Add a problem of the field `name`."""
        value = repr(self.raw.get(name))
        self.problems.append(Problem(f"`{name}` is {value[:60]}: {why}", self.place, hint))

    def count(self, name: str, default: int | None = None, limit: int = 10_000_000) -> int:
        """A whole number from 1 to `limit`."""
        value = self.raw.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= limit:
            self.wrong(name, f"expected a whole number from 1 to {limit}")
            return 1
        return value

    def number(self, name: str, default: float) -> float:
        """A positive number."""
        value = self.raw.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
            self.wrong(name, "expected a positive number")
            return default
        return float(value)

    def flag(self, name: bool | str) -> bool:
        """The truth value of the field `name`, false if it is absent; a bool is returned as it is."""
        value = name if isinstance(name, bool) else self.raw.get(name) or False
        if not isinstance(value, bool):
            self.wrong(str(name), "expected true or false")
        return bool(value)

    def layers(self, name: str, num_layers: int, values: tuple[object, ...]) -> list[Any] | None:
        """A list with one of `values` for each layer; None if the field is absent."""
        value = self.raw.get(name)
        if value is None:
            return None
        if (
            not isinstance(value, list)
            or len(value) != num_layers
            or any(kind not in values for kind in value)
        ):
            self.wrong(name, f"expected {num_layers} of {', '.join(map(repr, values))}")
            return None
        return value

    def check(self) -> None:
        """Raise ModelError with all problems, each once."""
        if self.problems:
            raise ModelError.of(dict.fromkeys(self.problems))
