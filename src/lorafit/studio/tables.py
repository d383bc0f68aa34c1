"""What else a run directory holds, as tables: JSON files that no section shows, exports, and the names of all files.

A feature that writes a JSON file into a run is thereby shown, without a change here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lorafit.observe.units import memory_size
from lorafit.redact import redact
from lorafit.run_dir import RunDirectory
from lorafit.storage.safe_read import parse_json, read_bytes

MOST_BYTES, MOST_TABLES, MOST_ROWS, MOST_COLUMNS, MOST_FILES = 2_000_000, 12, 100, 12, 200
_SHOWN = {
    "env",
    "prompt",
    "ledger",
    "check",
    "samples",
    "proof",
    "rows",
}  # the report has a section for these


@dataclass(frozen=True, slots=True)
class Table:
    """A JSON file as a table; `more` is the number of rows that are left out."""

    name: str
    columns: list[str]
    rows: list[list[str]]
    more: int = 0


def tables_of(run: RunDirectory) -> list[Table]:
    """The JSON files of the run and of its exports that no section shows. Damaged ones are left out."""
    found = []
    for path in _json_files(run):
        with suppress(OSError, ValueError):
            content = read_bytes(path, MOST_BYTES)
            if path.suffix == ".jsonl":
                lines = content.decode().splitlines()
                value: object = [parse_json(line) for line in lines[: MOST_ROWS + 1]]
                found.append(_table(str(path.relative_to(run.path)), value, len(lines)))
            else:
                found.append(_table(str(path.relative_to(run.path)), parse_json(content.decode()), 0))
        if len(found) == MOST_TABLES:
            break
    return found


def files_of(run: RunDirectory) -> list[tuple[str, str]]:
    """(path below the run, size) of its files, at most MOST_FILES."""
    found = []
    for pattern in ("*", "*/*", "*/*/*"):
        for path in sorted(run.path.glob(pattern)):
            with suppress(OSError):
                if path.is_file() and not path.is_symlink():
                    found.append((str(path.relative_to(run.path)), memory_size(path.stat().st_size)))
            if len(found) == MOST_FILES:
                return found
    return found


def _json_files(run: RunDirectory) -> Iterator[Path]:
    for path in sorted(run.path.glob("*.json*")):
        own = path.suffix == ".json" and path.stem in _SHOWN
        if path.suffix in (".json", ".jsonl") and not own and path != run.metrics_file:
            yield path
    for name in ("parity.json", "export.json", "lorafit.json"):
        yield from sorted(run.exports.glob(f"*/{name}"))


def _table(name: str, value: object, num_rows: int) -> Table:
    if isinstance(value, list):
        objects = [row if isinstance(row, dict) else {"value": row} for row in value[:MOST_ROWS]]
        columns = list(dict.fromkeys(str(key) for row in objects for key in row))[:MOST_COLUMNS]
        rows = [[_cell(row.get(column, "")) for column in columns] for row in objects]
        return Table(name, columns, rows, max(len(value), num_rows) - len(rows))
    if isinstance(value, dict):
        pairs = list(value.items())
        rows = [[str(key), _cell(item)] for key, item in pairs[:MOST_ROWS]]
        return Table(name, [], rows, len(pairs) - len(rows))
    return Table(name, [], [["", _cell(value)]])


def _cell(value: object) -> str:
    if isinstance(value, str):
        return redact(value)[:500]
    if isinstance(value, float):
        return f"{value:.6g}"
    return redact(json.dumps(value, ensure_ascii=False))[:500]
