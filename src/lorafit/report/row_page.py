"""Rendered rows as one HTML page that opens without a network."""

from __future__ import annotations

from collections.abc import Sequence

from lorafit.data.row_preview import RowView
from lorafit.report.escape import own_text, render


def page(title: str, rows: Sequence[tuple[RowView, Sequence[tuple[str, str]]]], *, ids: bool = False) -> str:
    """A page without a script, for light and dark, of `rows`: (row, lines of its difference to a chat template).

    With `ids` each token is followed by its id.
    """
    return render("rows.html", title=title, rows=rows, ids=ids, style=own_text("rows.css"))
