"""Writes a generated part into a page, between the marks `<!-- NAME: begin -->` and `<!-- NAME: end -->`."""

from __future__ import annotations

from pathlib import Path


def put_between(page: Path, name: str, part: str) -> None:
    """Replace the text between the two marks. Raises SystemExit if the page or a mark is missing."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    head, begin_mark, rest = text.partition(begin)
    _, end_mark, tail = rest.partition(end)
    if not (begin_mark and end_mark):
        raise SystemExit(f"error: {page} has no `{begin}` and `{end}`")
    page.write_text(f"{head}{begin}\n\n{part.strip()}\n\n{end}{tail}", encoding="utf-8")
