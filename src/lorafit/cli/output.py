"""What a command prints leaves through these functions: printable, and without secrets where it is no model's text."""

from __future__ import annotations

import sys
from typing import Any

import typer

from lorafit.redact import json_line, line, printable


def put_line(text: object = "", *, err: bool = False) -> None:
    """Print one line: a path, a message."""
    typer.echo(line(text), err=err)


def put_text(text: str, *, end: str = "\n") -> None:
    """Print a text of any number of lines: a prompt, an answer or a piece of one."""
    typer.echo(printable(text) + end, nl=False)


def put_json(value: Any) -> None:
    """Print a value as one line of JSON."""
    typer.echo(json_line(value))


def load_torch() -> None:
    """Import torch, which takes seconds; a terminal shows it."""
    from lorafit.observe.console import can_redraw, console_of
    from lorafit.observe.progress import progress

    with progress("loading torch", quiet=not can_redraw(console_of(sys.stderr))):
        from lorafit.model import dtypes  # noqa: F401  (it imports torch)
