"""Rows that a Python program has in memory, as a file of the cache that is named by their SHA-256.

The same rows are the same file, so that a later run finds their tokens, and a resume its rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorafit.errors import DataError
from lorafit.storage.atomic import write_lines
from lorafit.storage.cache_dir import cache_folder


def rows_file(rows: Sequence[Mapping[str, Any]]) -> Path:
    """The file of `rows`, one JSON object per line. Raises DataError for a row that JSON cannot hold, or no row."""
    if not rows:
        raise DataError(
            "the list of rows is empty", hint='give rows such as {"instruction": ..., "output": ...}'
        )
    lines = []
    for number, row in enumerate(rows, 1):
        try:
            lines.append(json.dumps(dict(row), ensure_ascii=False, allow_nan=False).encode() + b"\n")
        except (TypeError, ValueError, RecursionError) as error:
            hint = "a row is a dictionary of texts, numbers, lists and dictionaries"
            raise DataError(f"a row is no JSON object: {error}", place=f"row {number}", hint=hint) from None
    digest = hashlib.sha256(b"".join(lines)).hexdigest()
    try:
        path = cache_folder("rows") / f"{digest}.jsonl"
    except OSError as error:
        hint = "set LORAFIT_CACHE to a folder of your own, or write the rows to a file"
        raise DataError(f"the rows cannot be kept: {error}", hint=hint) from None
    if not path.is_file():
        write_lines(path, lines, sum(map(len, lines)))
    return path
