"""Tables, colours, answers side by side and clean text on a terminal."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lorafit.redact import printable

SIDE_BY_SIDE_WIDTH = 80


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, stream: TextIO | None = None) -> None:
    """Print rows of text in columns. A terminal folds long cells into its width; a pipe gets whole rows."""
    console = _console(stream or sys.stdout)
    if not console.is_terminal:
        console.width = 10_000
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for header in headers:
        grid.add_column(Text(header), overflow="fold")
    for row in rows:
        grid.add_row(*(Text(_clean(cell, console)) for cell in row))
    console.print(grid)


STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red"}


def print_verdicts(lines: Sequence[tuple[str, str, str]], *, stream: TextIO | None = None) -> None:
    """Print (pass, warn or fail; what was looked at; what was found), one a line and unbroken."""
    width = max((len(name) for _, name, _ in lines), default=0)
    for outcome, name, text in lines:
        print_styled([(outcome, STYLES[outcome]), (f"  {name:<{width}}  {text}", "")], stream=stream)


def has_colours(stream: TextIO | None = None) -> bool:
    """Whether `stream` is a terminal that shows colours, and the user wants them."""
    console = _console(stream or sys.stdout)
    return console.color_system is not None and not console.no_color


def print_styled(parts: Sequence[tuple[str, str]], *, stream: TextIO | None = None) -> None:
    """Print (text, style) one after the other, unbroken; the text alone where there are no colours."""
    console = _console(stream or sys.stdout)
    console.print(Text.assemble(*((_clean(text, console), style) for text, style in parts)), soft_wrap=True)


def side_by_side(question: str, base_answer: str, tuned_answer: str, *, stream: TextIO | None = None) -> None:
    """Print what the base model and the tuned model answer to `question`, next to each other.

    Below 80 columns the answers stand under each other.
    """
    console = _console(stream or sys.stdout)
    console.print(Text(_clean(question.strip(), console), style="bold"))
    console.print(_two_answers(console, base_answer, tuned_answer))
    console.print()


def _two_answers(console: Console, base_answer: str, tuned_answer: str) -> RenderableType:
    base, tuned = (Text(_clean(answer.strip(), console)) for answer in (base_answer, tuned_answer))
    if console.width < SIDE_BY_SIDE_WIDTH:
        titles = (Text(title, style="cyan") for title in ("base", "tuned"))
        answers_below = (Padding(answer, (0, 0, 0, 2)) for answer in (base, tuned))
        return Group(*(part for pair in zip(titles, answers_below, strict=True) for part in pair))
    answers = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, expand=True)
    answers.add_column(Text("base", style="cyan"), ratio=1, overflow="fold")
    answers.add_column(Text("tuned", style="cyan"), ratio=1, overflow="fold")
    answers.add_row(base, tuned)
    return answers


def _console(stream: TextIO) -> Console:
    return Console(file=stream, highlight=False, markup=False, emoji=False)


def _draws(console: Console) -> bool:
    """Whether the console can move its cursor, so that something may be drawn over."""
    return console.is_terminal and not console.is_dumb_terminal


def _print_line(console: Console, line: str, style: str = "") -> None:
    """Print `line` unbroken, whatever the width, so that paths in it can be copied."""
    console.print(Text(_clean(line, console), style=style), soft_wrap=True)


def _clean(text: str, console: Console) -> str:
    """Printable `text` in which a question mark stands for what the console's encoding lacks."""
    return printable(text).encode(console.encoding, "replace").decode(console.encoding)


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
