"""Rows that a Python program has in memory, as a file of the cache that is named by their SHA-256.

The same rows are the same file, so that a later run finds their tokens, and a resume its rows.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from os import PathLike
from pathlib import Path
from typing import Any

from lorafit.errors import DataError
from lorafit.storage.atomic import write_lines
from lorafit.storage.cache_dir import cache_folder, cache_home

_FOLDER = "rows"  # of the cache
_EXAMPLE = '[{"instruction": ..., "output": ...}]'
_INDEX = "__index_level_"  # the columns in which Arrow has the index of a DataFrame


def rows_in(value: object) -> Sequence[Any] | None:
    """The rows of a list, a generator, a `datasets.Dataset`, or a table with Arrow's interface such as a DataFrame.

    None where `value` is none of these, but names of files or a setting. Raises DataError where it has no rows.
    """
    if isinstance(value, str | bytes | PathLike):
        return None
    hint = f"rows are a list: {_EXAMPLE}"
    if hasattr(value, "__arrow_c_stream__"):
        import pyarrow

        try:
            table = pyarrow.table(value)
        except pyarrow.ArrowInvalid:
            raise DataError(f"`data` is a {type(value).__name__}, which is no table", hint=hint) from None
        index = [name for name in table.column_names if name.startswith(_INDEX)]
        rows: list[Any] = table.drop_columns(index).to_pylist()
    elif not isinstance(value, Iterable):
        return None
    elif isinstance(value, Mapping):
        hint += '; of a DatasetDict give one split, such as `data["train"]`'
        raise DataError(f"`data` is a {type(value).__name__}, which is no list of rows", hint=hint)
    else:
        rows = list(value)
        if rows and not any(isinstance(row, Mapping) for row in rows):
            if isinstance(value, list | tuple):
                return None
            raise DataError(f"`data` is a {type(value).__name__} without rows", hint=hint)
    if not rows:
        raise DataError("the list of rows is empty", hint=hint)
    return rows


def rows_file(rows: Sequence[Mapping[str, Any]]) -> Path:
    """The file of `rows`, one JSON object per line. Raises DataError for a row that JSON cannot hold."""
    lines = []
    for number, row in enumerate(rows, 1):
        try:
            if not isinstance(row, Mapping):
                raise TypeError(f"it is a {type(row).__name__}")
            line = json.dumps(dict(row), ensure_ascii=False, allow_nan=False, default=_text)
            lines.append(line.encode() + b"\n")
        except (TypeError, ValueError, RecursionError) as error:
            hint = "a row is a dictionary of texts, numbers, lists and dictionaries"
            raise DataError(f"a row is no JSON object: {error}", place=f"row {number}", hint=hint) from None
    digest = hashlib.sha256(b"".join(lines)).hexdigest()
    try:
        path = cache_folder(_FOLDER) / f"{digest}.jsonl"
    except OSError as error:
        hint = "set LORAFIT_CACHE to a folder of your own, or write the rows to a file"
        raise DataError(f"the rows cannot be kept: {error}", hint=hint) from None
    if not path.is_file():
        write_lines(path, lines, sum(map(len, lines)))
    return path


def name_of(path: Path) -> str:
    """What messages call the file at `path`: the path, or `rows in memory` with the beginning of their SHA-256."""
    is_ours = path.parent == cache_home() / _FOLDER and len(path.stem) == 64
    return f"rows in memory ({path.stem[:8]})" if is_ours else str(path)


def _text(value: object) -> str:
    """A date, a time or a decimal number of a table as text. Raises TypeError for other things."""
    if isinstance(value, datetime.date | datetime.time | Decimal):
        return str(value)
    raise TypeError(f"a value is a {type(value).__name__}")
