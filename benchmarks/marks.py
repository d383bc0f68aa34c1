"""Tables in the documents: what stands between the marks `<!-- NAME: begin -->` and `<!-- NAME: end -->` of a page."""

from __future__ import annotations

from pathlib import Path


def put_between(page: Path, name: str, part: str) -> None:
    """Replace what stands between the two marks. Exits with one line where the page is missing or has none."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    head, found, rest = text.partition(begin)
    _, also, tail = rest.partition(end)
    if not (found and also):
        raise SystemExit(f"error: {page} has no `{begin}` and `{end}`")
    page.write_text(f"{head}{begin}\n\n{part.strip()}\n\n{end}{tail}", encoding="utf-8")
