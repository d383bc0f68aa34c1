"""HTML from the templates of this folder: every value is escaped, and unseen characters become visible."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lorafit.redact import visible

if TYPE_CHECKING:
    from lorafit.data.row_preview import RowView


def render(template: str, **values: Any) -> str:
    """The text of a file in `templates/`, filled with `values`, which may come from anywhere."""
    return _ENVIRONMENT.get_template(template).render(values)


def rows_page(
    title: str, rows: Sequence[tuple[RowView, Sequence[tuple[str, str]]]], *, ids: bool = False
) -> str:
    """A page without a script, for light and dark, of `rows`: (row, lines of its difference to a chat template).

    With `ids` each token is followed by its id.
    """
    return render("rows.html", title=title, rows=rows, ids=ids, style=own_text("rows.css"))


def own_text(name: str) -> Markup:
    """A style or script of `templates/`: the one text that a page takes unescaped."""
    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))  # noqa: S704 (a file of this package)


def cut(text: object, most: int) -> str:
    """At most `most` characters of `text`, and the number of those that follow."""
    whole = str(text)
    if len(whole) <= most:
        return whole
    return f"{whole[:most].rstrip()} [... {len(whole) - most:,} characters more]"


def _finalized(value: Any) -> Any:
    """A value as jinja escapes it next. What the model reads matters in a report, so nothing in it is removed."""
    return value if isinstance(value, Markup) else visible(str(value).replace("\r\n", "\n"))


def environment(*folders: Path, **names: Any) -> Environment:
    """Templates of `folders` and of this package, which escape by default, with `names` known in all of them.

    The name `_` translates the English texts of this package's templates.
    """
    made = Environment(
        loader=FileSystemLoader([*folders, TEMPLATES]),
        autoescape=True,
        finalize=_finalized,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"cut": cut, "thousands": lambda number: f"{number:,.0f}"}
    made.globals |= {"_": str, **names}
    return made


TEMPLATES = Path(__file__).parent / "templates"
_ENVIRONMENT = environment()
