"""Rendered rows as HTML: a fragment for a larger page, and one page of its own that opens without a network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from lorafit.data.row_preview import RowView
from lorafit.redact import visible

# Colours come as pairs, for light and dark; what is trained is also underlined: colour alone tells nobody apart.
STYLE = """
.row { margin: 0 0 2rem; }
.row h2 { font: 600 .95rem/1.4 system-ui, sans-serif; margin: 0 0 .5rem; overflow-wrap: anywhere; }
.row pre { font: .9rem/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; margin: 0;
  padding: 1rem; border: 1px solid var(--line); border-radius: .5rem; background: var(--panel);
  white-space: pre-wrap; overflow-wrap: anywhere; }
.row .trained { background: var(--trained); box-shadow: inset 0 -2px var(--trained-line); }
.row .read { color: var(--read); }
.row .cut { text-decoration: line-through; opacity: .6; }
.row .control { color: var(--control); font-weight: 600; }
.row .id { color: var(--read); font-size: .7rem; vertical-align: sub; user-select: none; margin: 0 .25rem 0 .1rem; }
.row .minus { background: var(--minus); } .row .plus { background: var(--plus); }
.row pre + pre, .row pre + h3 { margin-top: .75rem; }
.row h3 { font: 600 .85rem/1.4 system-ui, sans-serif; margin: .75rem 0 .25rem; }
"""
_PAGE_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1a1d21; --read: #5b6470; --line: #d9dde3; --panel: #f7f8fa;
  --trained: #d5f0dc; --trained-line: #2c8a4b; --control: #8a3ffc; --minus: #fbd9d9; --plus: #d5f0dc; }
@media (prefers-color-scheme: dark) { :root { --back: #14171a; --text: #e7eaee; --read: #9aa4b0; --line: #333a42;
  --panel: #1b1f24; --trained: #16432a; --trained-line: #4fc47a; --control: #c8a2ff; --minus: #5a2326;
  --plus: #16432a; } }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1rem; background: var(--back); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.25rem; margin: 0 0 .25rem; } p.legend { color: var(--read); margin: 0 0 1.5rem; }
p.legend span { padding: 0 .25rem; border-radius: .2rem; }
"""


def fragment(view: RowView, ids: bool = False, difference: Sequence[tuple[str, str]] = ()) -> str:
    """One row as a `<section class="row">`, to be shown with STYLE and its colours."""
    body = _tokens(view) if ids else _text(view)
    parts = [f"<h2>{escape(visible(view.heading))}</h2>"]
    if body:
        parts.append(f"<pre>{body}</pre>")
    if difference:
        parts.append("<h3>from the model's chat template (-) to this row (+)</h3>")
        parts.append(f"<pre>{_difference(difference)}</pre>")
    return f'<section class="row">{"".join(parts)}</section>'


def page(title: str, fragments: Sequence[str]) -> str:
    """A whole page of row fragments: no script, nothing fetched, light and dark."""
    legend = (
        '<p class="legend row"><span class="trained">trained</span> <span class="read">read only</span> '
        '<span class="control">control token</span> <span class="cut">cut off</span></p>'
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(visible(title))}</title>\n<style>{_PAGE_STYLE}{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(visible(title))}</h1>\n{legend}\n" + "\n".join(fragments) + "\n</body>\n</html>\n"
    )


def _text(view: RowView) -> str:
    return "".join(
        f'<span class="{stretch.kind}{" control" if stretch.control else ""}">{_escaped(stretch.text)}</span>'
        for stretch in view.stretches
    )


def _tokens(view: RowView) -> str:
    return "".join(
        f'<span class="{token.kind}">{_escaped(token.text)}</span><span class="id">{token.id}</span>'
        + ("\n" if token.text.endswith("\n") else "")
        for token in view.tokens
    )


def _difference(difference: Sequence[tuple[str, str]]) -> str:
    names = {" ": "read", "-": "minus", "+": "plus"}
    return "\n".join(f'<span class="{names[sign]}">{sign} {escape(line)}</span>' for sign, line in difference)


def _escaped(text: str) -> str:
    return escape(visible(text))
