"""Answers as they are made: flowing text, two side by side, and what is said in between."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.cells import cell_len
from rich.live import Live

from .terminal import _clean, _console, _draws, _print_line, _two_answers, printable


@contextmanager
def growing_side_by_side(*, stream: TextIO | None = None) -> Iterator[Callable[[str, str], None]]:
    """Show two answers as `side_by_side` does while they grow: call what the block gets with both, as far as they are.

    Where nothing can be drawn over, they are printed once, at the end.
    """
    console = _console(stream or sys.stdout)
    latest = ("", "")
    live = Live(console=console, transient=True, redirect_stdout=False, redirect_stderr=False)

    def draw(base_answer: str, tuned_answer: str) -> None:
        nonlocal latest
        latest = (base_answer, tuned_answer)
        live.update(_two_answers(console, *latest))

    with live if _draws(console) else contextlib.nullcontext():
        yield draw
    console.print(_two_answers(console, *latest))


@contextmanager
def flowing(*, stream: TextIO | None = None) -> Iterator[Callable[[str], None]]:
    """Print a text that comes in pieces, then end the line. A terminal gets whole words, wrapped at its width."""
    console = _console(stream or sys.stdout)
    wraps, column, word = _draws(console), 0, ""

    def put(text: str) -> None:
        console.file.write(_clean(text, console))
        console.file.flush()

    def put_word() -> None:
        nonlocal column, word
        width = cell_len(word)
        if column and column + width > console.width:
            put("\n")
            column = 0
        put(word)
        column, word = column + width, ""

    def write(piece: str) -> None:
        nonlocal column, word
        if not wraps:
            put(piece)
            return
        for part in re.findall(r"\n|[^\S\n]|\S+", printable(piece)):
            if not part.isspace():
                word += part
                continue
            put_word()
            if part == "\n" or column < console.width:  # else the line ends here anyway
                put(part)
            column = 0 if part == "\n" else column + 1

    try:
        yield write
    finally:
        put_word()
        put("\n")


def note(text: str, *, stream: TextIO | None = None) -> None:
    """Say something in passing, on stderr."""
    _print_line(_console(stream or sys.stderr), text, "dim")
