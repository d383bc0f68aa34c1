"""Tables, colours, answers side by side and printable text on a terminal or in a pipe.

Text may come from anywhere (model answers, file names): it is never read as markup. `clean` is for texts of several
lines, `clean_line` for all others.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleRenderable, Group, RenderableType
from rich.control import Control
from rich.live import Live
from rich.padding import Padding
from rich.segment import ControlType
from rich.table import Table
from rich.text import Text

from lorafit.redact import line, lines, printable

SIDE_BY_SIDE_WIDTH = 80
PIPE_WIDTH = 100
INDENT = "  "  # of the lines after the first of a wrapped text


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, stream: TextIO | None = None) -> None:
    """Print rows of text in columns, wrapped between words to the width of the terminal, or to PIPE_WIDTH in a pipe. A
    terminal that is too narrow for the longest word of each column gets a list for each row. No word is cut.
    """
    console = console_of(stream or sys.stdout)
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    cells = iter(lines(cell for row in (headers, *rows) for cell in row))  # the secrets are looked up once
    headers, *rows = [[_encodable(next(cells), console) for _ in row] for row in (headers, *rows)]
    columns = zip(headers, *rows, strict=True)
    longest = [
        max((cell_len(word) for cell in column for word in cell.split()), default=0) for column in columns
    ]
    least = sum(longest) + 3 * len(longest)
    if not console.is_terminal:
        console.width = max(PIPE_WIDTH, least)
    elif least > console.width:
        for row in rows:
            _print_as_list(console, headers, row)
        return
    for header, width in zip(headers, longest, strict=True):
        grid.add_column(Text(header), overflow="fold", min_width=width)
    for row in rows:
        grid.add_row(*map(Text, row))
    console.print(grid)


def _print_as_list(console: Console, headers: Sequence[str], row: Sequence[str]) -> None:
    """Print a row of a table: its first cell, and below it each other cell that has a text, with its header."""
    width = max(map(len, headers))
    _print_wrapped(console, Text(row[0], style="bold"))
    for header, cell in zip(headers[1:], row[1:], strict=True):
        if cell.strip():
            _print_wrapped(console, Text(f"{INDENT}{header:<{width}}  {cell}"))


STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red"}


def print_verdicts(
    lines: Sequence[tuple[str, str, str]], *, passed: str = "pass", stream: TextIO | None = None
) -> None:
    """Print (pass, warn or fail; name of the check; text), one per line, on a terminal wrapped between words; `passed`
    is the word for a pass.
    """
    console = console_of(stream or sys.stdout)
    width = max((len(name) for _, name, _ in lines), default=0)
    for outcome, name, text in lines:
        word = f"{passed:<4}" if outcome == "pass" else outcome
        parts = [(word, STYLES[outcome]), (line(f"  {name:<{width}}  {text}"), "")]
        _print_wrapped(console, Text.assemble(*((clean(part, console), style) for part, style in parts)))


def has_colours(stream: TextIO | None = None) -> bool:
    """Whether `stream` is a terminal with colours, and the user has not switched them off."""
    console = console_of(stream or sys.stdout)
    return console.color_system is not None and not console.no_color


def print_styled(parts: Sequence[tuple[str, str]], *, stream: TextIO | None = None) -> None:
    """Print pieces (text, style) one after the other, without line breaks; no style where there are no colours."""
    console = console_of(stream or sys.stdout)
    console.print(Text.assemble(*((clean(text, console), style) for text, style in parts)), soft_wrap=True)


def side_by_side(
    question: str,
    base_answer: str,
    tuned_answer: str,
    *,
    stream: TextIO | None = None,
    titles: tuple[str, str] = ("base", "tuned"),
) -> None:
    """Print the answers of the base and the tuned model to `question` side by side; below 80 columns, one above the
    other. Other models have other `titles`.
    """
    console = console_of(stream or sys.stdout)
    console.print(Text(clean(question.strip(), console), style="bold"))
    console.print(_two_answers(console, base_answer, tuned_answer, titles))
    console.print()


def _two_answers(
    console: Console, base_answer: str, tuned_answer: str, titles: tuple[str, str] = ("base", "tuned")
) -> RenderableType:
    base, tuned = (Text(clean(answer.strip(), console)) for answer in (base_answer, tuned_answer))
    if console.width < SIDE_BY_SIDE_WIDTH:
        above = (Text(title, style="cyan") for title in titles)
        answers_below = (Padding(answer, (0, 0, 0, 2)) for answer in (base, tuned))
        return Group(*(part for pair in zip(above, answers_below, strict=True) for part in pair))
    answers = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, expand=True)
    for title in titles:
        answers.add_column(Text(title, style="cyan"), ratio=1, overflow="fold")
    answers.add_row(base, tuned)
    return answers


class _Console(Console):
    """A console that leaves a closed pipe to its caller: rich ends the process there, also a run that trains."""

    def on_broken_pipe(self) -> None:
        raise  # the BrokenPipeError that rich is handling


def console_of(stream: TextIO) -> Console:
    """A console that prints text as it is. Raises BrokenPipeError where the reader has closed the pipe."""
    return _Console(file=stream, highlight=False, markup=False, emoji=False)


def can_redraw(console: Console) -> bool:
    """Whether the console can move its cursor, so that a line can be drawn again."""
    return console.is_terminal and not console.is_dumb_terminal


class LiveLine(Live):
    """A line of the terminal's width that is drawn again in its place, also after the terminal became narrower: all
    rows are erased into which the terminal has wrapped it. stdout is not redirected: it may be a pipe with results.
    """

    def __init__(self, console: Console, get_renderable: Callable[[], RenderableType]) -> None:
        super().__init__(
            console=console, transient=True, redirect_stdout=False, get_renderable=get_renderable
        )
        self._drawn = 0  # columns of the line on the screen

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Erase the rows above the last one of a wrapped line; the parent erases that one and draws the line."""
        width = self.console.width
        above = max(0, -(-self._drawn // width) - 1) if _wraps_old_lines() else 0
        self._drawn = width
        erase = Control(*[(ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)] * above)
        return super().process_renderables([erase, *renderables])


def _wraps_old_lines() -> bool:
    """Whether the terminal wraps the lines on its screen when it becomes narrower; xterm and GNU screen cut them."""
    return "TMUX" in os.environ or not {"XTERM_VERSION", "STY"} & os.environ.keys()


def print_line(console: Console, text: str, style: str = "") -> None:
    """Print `text` in one line, which a terminal gets wrapped between words."""
    _print_wrapped(console, Text(clean_line(text, console), style=style))


def _print_wrapped(console: Console, text: Text) -> None:
    """Print `text`. A terminal gets it wrapped between words; words are never cut, so that paths can be copied."""
    plain, breaks, column = text.plain, [], 0
    for word in re.finditer(r"\S+\s*|\s+", plain if can_redraw(console) else ""):
        if column and column + cell_len(word[0].rstrip()) > console.width:
            breaks.append(word.start())
            column = len(INDENT)
        column += cell_len(word[0])
    for number, part in enumerate(text.divide(breaks)):
        part.rstrip()
        console.print(Text(INDENT * bool(number)) + part, soft_wrap=True)


def clean(text: str, console: Console) -> str:
    """Printable `text`, with a question mark for each character that the console's encoding lacks."""
    return _encodable(printable(text), console)


def clean_line(text: str, console: Console) -> str:
    """As `clean`, in one line without secrets."""
    return _encodable(line(text), console)


def _encodable(text: str, console: Console) -> str:
    return text.encode(console.encoding, "replace").decode(console.encoding)


@contextmanager
def growing_side_by_side(*, stream: TextIO | None = None) -> Iterator[Callable[[str, str], None]]:
    """Show two growing answers as `side_by_side` does; the block calls the function it gets with both texts so far.

    Where lines cannot be drawn again, the answers are printed once, at the end.
    """
    console = console_of(stream or sys.stdout)
    latest = ("", "")
    live = Live(console=console, transient=True, redirect_stdout=False, redirect_stderr=False)

    def draw(base_answer: str, tuned_answer: str) -> None:
        nonlocal latest
        latest = (base_answer, tuned_answer)
        live.update(_two_answers(console, *latest))

    with live if can_redraw(console) else contextlib.nullcontext():
        yield draw
    console.print(_two_answers(console, *latest))


@contextmanager
def flowing(*, stream: TextIO | None = None) -> Iterator[Callable[[str], None]]:
    """Print a text in pieces, then end the line. On a terminal, words are wrapped at its width."""
    console = console_of(stream or sys.stdout)
    wraps, column, word = can_redraw(console), 0, ""

    def put(text: str) -> None:
        console.file.write(clean(text, console))
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
            if part == "\n" or column < console.width:  # else the line is full
                put(part)
            column = 0 if part == "\n" else column + 1

    try:
        yield write
    finally:
        put_word()
        put("\n")


def note(text: str, *, stream: TextIO | None = None) -> None:
    """Print a dim line on stderr."""
    print_line(console_of(stream or sys.stderr), text, "dim")
