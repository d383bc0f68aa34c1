"""What the pages share: templates in the language of a request, forms, headers, replies to errors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from jinja2 import Environment
from markupsafe import Markup, escape
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from lorafit.errors import LorafitError, Problem
from lorafit.observe.units import duration
from lorafit.report.escape import environment
from lorafit.serve.errors import ApiError
from lorafit.studio.texts import LANGUAGES, chosen, table
from lorafit.version import __version__

LANGUAGE_COOKIE = "lorafit-language"
HERE = Path(__file__).parent
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with `no-referrer` a form sends `Origin: null`
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
}
Fields = dict[str, str]


@cache
def _environment(language: str) -> Environment:
    texts = table(language)

    def text(key: str, **values: object) -> str:
        return texts[key].format(**values) if values else texts[key]

    def named(name: object) -> str:
        return texts.get(f"= {name}", str(name))

    def translated(kind: str, key: str, english: str) -> str:
        return texts.get(f"{kind} {key}", english)

    made = environment(
        HERE / "templates", t=text, _=named, translated=translated, language=language, languages=LANGUAGES
    )
    made.filters |= {"duration": duration, "ticks": _ticks}
    return made


def _ticks(text: str) -> Markup:
    """What stands between backticks as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704 (it is escaped)


def language_of(request: Request) -> str:
    """The language of the pages of a request."""
    return chosen(request.cookies.get(LANGUAGE_COOKIE, ""), request.headers.get("accept-language", ""))


def filled(request: Request, template: str, **values: Any) -> Markup:
    """A template in the language of `request`, as a piece of a page."""
    found = _environment(language_of(request)).get_template(template)
    return Markup(found.render(request=request, version=__version__, **values))  # noqa: S704 (it is escaped)


def html(request: Request, template: str, *, status: int = 200, **values: Any) -> Response:
    """A page, or a piece of one that a script puts in its place."""
    return HTMLResponse(filled(request, template, **values), status)


def problems_page(request: Request, error: LorafitError, status: int = 400) -> Response:
    """What is wrong, where, and what to do."""
    return html(request, "problems.html", status=status, problems=error.problems)


def refusal(error: ApiError) -> Response:
    """The reply to a request without the token, from another site, or that is too large."""
    problem = Problem(error.message)
    page = _environment("en").get_template("refused.html").render(problem=problem, status=error.status)
    return HTMLResponse(page, error.status, HEADERS)


async def form(request: Request) -> Fields:
    """The fields of a form, each once; the last of the same name counts."""
    body = (await request.body()).decode(errors="replace")
    return dict(parse_qsl(body, keep_blank_values=True, max_num_fields=1000))


async def listed(request: Request, name: str) -> list[str]:
    """The values of a field of a form that may have several."""
    body = (await request.body()).decode(errors="replace")
    return [value for key, value in parse_qsl(body, max_num_fields=1000) if key == name]


def seen(target: str) -> RedirectResponse:
    """To another page after a change, so that a reload does not repeat it."""
    return RedirectResponse(target, 303)


def local(address: str) -> str:
    """An address of the studio itself, its first page where `address` is none."""
    return address if address.startswith("/") and not address.startswith(("//", "/\\")) else "/"


def number_in(values: Mapping[str, str], name: str, default: float) -> float:
    """A number of a query, the default where it is none."""
    try:
        value = float(values.get(name, ""))
    except ValueError:
        return default
    return value if abs(value) < 1e15 else default
