"""What lorafit has for the settings of other programs: the table in other_tools.txt."""

from __future__ import annotations

import functools
from pathlib import Path

_TABLE = Path(__file__).with_suffix(".txt")


@functools.cache
def answers() -> dict[str, str]:
    """The answer to each setting of another program, by its name."""
    found: dict[str, str] = {}
    key = ""
    for line in _TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):
            found.update(dict.fromkeys(line.split(), key))
        elif not line.startswith("#"):
            key = line.removesuffix(":")
    return found


def answer(name: str) -> str:
    """What lorafit has for the setting `name` of another program: `in lorafit: train.learning_rate`, "" if unknown.

    Case and the kind of dash do not matter: `--learning-rate` is `learning_rate`.
    """
    found = answers().get(name.lstrip("-").replace("-", "_").lower(), "")
    return found if not found or found.startswith("not ") else f"in lorafit: {found}"
