"""Text from anywhere (rows, answers, file names) made harmless and visible in a page."""

from __future__ import annotations

import re
from html import escape

_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"
    "\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)


def html(text: object) -> str:
    """`text` for HTML, in an element or an attribute.

    Characters that are not seen or that turn the direction of what follows are shown by their number: in a report
    it matters what a model really read.
    """
    return escape(_INVISIBLE.sub(_shown, str(text).replace("\r\n", "\n")))


def cut(text: object, most: int) -> str:
    """At most `most` characters of `text`; that more follow is said."""
    whole = str(text)
    return (
        whole
        if len(whole) <= most
        else f"{whole[:most].rstrip()} [... {len(whole) - most:,} characters more]"
    )


def _shown(match: re.Match[str]) -> str:
    return f"[U+{ord(match.group()):04X}]"
