"""What is drawn fits its width, reads the same on a terminal and in a file, and obeys nothing it shows."""

from __future__ import annotations

import contextlib
import io
import os
import re
from contextlib import closing
from itertools import pairwise

import pytest
from rich.cells import cell_len
from rich.console import Console
from tests.waiting import Clock, until

from lorafit.observe import terminal
from lorafit.observe.console import LiveLine, console_of, print_line, print_verdicts, side_by_side, table
from lorafit.observe.events import Answers, Event, Heldout, Message, Proved, RunEnded, RunStarted, Saved, Step
from lorafit.observe.progress import progress
from lorafit.observe.terminal import Terminal
from lorafit.redact import printable

RUN: list[Event] = [
    RunStarted("tiny/model", 52_002, 30, 1_100_048_384, 4_505_600, "cuda", "bfloat16", "runs/a"),
    *(
        Step(n, 30, n / 30, 2.0 - n / 100, 1.9e-4, 0.7, 90, 120, 4, 312.4, 2.0, 1_234_567_890)
        for n in range(1, 21)
    ),
    Heldout(20, 1.4121, 1.905, True),
    Answers(
        20, ["Where is\nit?", "Who?"], ["In the " + "long " * 20 + "grass.", "I."], [True, True], None, 0.5
    ),
    Saved(20, "runs/a/checkpoints/step-000020", "best"),  # has no line
    Saved(20, "runs/a/checkpoints/step-000020", "stopped"),
    Message("[red]nearly full[/red]\x1b[2J", "warning"),
    RunEnded(20, "interrupted", 72.0, "runs/a/adapter", 1.8),
]
PLAIN = """\
tiny/model  1.1B parameters, 4.51M trained (0.41 %)  cuda bfloat16
52,002 rows  30 steps  output runs/a
step 10/30  loss 1.900  lr 1.9e-04  312 tokens/s  eta 40s  1.2 GB
step 20/30  loss 1.800  lr 1.9e-04  312 tokens/s  eta 20s  1.2 GB
step 20  held-out loss 1.412 (base 1.905)  best so far
step 20  Where is it? -> In the long long long long long long long long long long ...
step 20  saved runs/a/checkpoints/step-000020 (stopped)
warning: [red]nearly full[/red]\\u001b[2J
interrupted after 20 steps in 1m 12s
adapter runs/a/adapter
"""

SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")


def shown_run(stream: io.StringIO, log_every: int = 10) -> str:
    with closing(Terminal(stream, log_every=log_every)) as observe:
        for event in RUN:
            observe(event)
    return stream.getvalue()


# The run


def test_plain_lines_in_a_file() -> None:
    assert shown_run(io.StringIO()) == PLAIN


def test_plain_lines_on_a_dumb_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert shown_run(Screen()) == PLAIN


def test_the_last_step_always_has_its_line() -> None:
    stream = io.StringIO()
    Terminal(stream)(Step(3, 3, 1.0, 1.0, 0.0, 0.7, 90, 120, 4, 312.4, 2.0, 5_000_000))
    assert stream.getvalue() == "step 3/3  loss 1.000  lr 0.0e+00  312 tokens/s  eta 0s  5 MB\n"


def test_a_terminal_has_a_live_line_and_the_permanent_ones_above(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    colored = shown_run(screen)
    assert "\x1b[33mwarning" in colored
    assert "\x1b[2J" not in colored
    assert "step 1/30" in colored
    assert "step 20/30" in colored
    assert SHOW_CURSOR in colored  # the cursor is back
    order = [
        "held-out loss 1.412",
        "saved runs/a/checkpoints/step-000020 (stopped)",
        "[red]nearly full",
        "adapter runs",
    ]
    assert all(colored.index(a) < colored.index(b) for a, b in pairwise(order))
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[33m" not in shown_run(Screen())


def test_a_later_measurement_that_is_preferred_is_not_called_the_best() -> None:
    """With `train.tolerance`, a loss within it of the lowest one counts as better, because it is later."""
    stream = io.StringIO()
    observe = Terminal(stream)
    for step, loss, best in ((10, 2.0, True), (20, 2.1, True), (30, 1.9, True), (40, 9.9, False)):
        observe(Heldout(step, loss, 4.0, best))
    assert [line.partition("(base 4.000)")[2].strip() for line in stream.getvalue().splitlines()] == [
        "best so far",
        "within train.tolerance of the lowest, 2.000: preferred, as it is later",
        "best so far",
        "",
    ]


@pytest.mark.parametrize(
    ("after", "other", "rows"),
    [(50, "", 2), (40, "", 3), (99, "", 2), (100, "", 1), (120, "", 1), (40, "XTERM_VERSION", 1)],
)
def test_all_rows_of_a_wrapped_line_are_erased(
    after: int, other: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal that becomes narrower wraps the line on its screen: the next drawing starts at its first row."""
    for name in ("TMUX", "XTERM_VERSION", "STY"):
        monkeypatch.delenv(name, raising=False)
    if other:
        monkeypatch.setenv(other, "1")
    screen = Screen()
    console = Console(file=screen, width=100, force_terminal=True)
    live = LiveLine(console, lambda: "-" * console.width)
    live.start(refresh=True)
    before, console.width = len(screen.getvalue()), after
    live.refresh()
    drawn = screen.getvalue()[before:]
    live.stop()
    assert drawn.count("\x1b[2K") == rows
    assert drawn.count("\x1b[1A") == rows - 1
    assert drawn.index("-" * after) > drawn.rindex("\x1b[2K")


def test_an_error_leaves_the_terminal_in_order() -> None:
    screen = Screen()

    def interrupted() -> None:
        with closing(Terminal(screen)) as observe:
            observe(RUN[1])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert screen.getvalue().rindex(SHOW_CURSOR) > screen.getvalue().rindex(HIDE_CURSOR)


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (40, "step 1200/3000 loss"),
        (60, "step 1200/3000 loss eta"),
        (80, "step 1200/3000 loss lr tokens/s eta"),
        (90, "step 1200/3000 loss lr tokens/s eta GB"),
        (120, "step 1200/3000 loss lr tokens/s 3s eta GB"),
    ],
)
def test_the_live_line_fits_and_drops_the_least_important_first(
    width: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Step(1200, 3000, 0.4, 1.9, 1.9e-4, 0.7, 90, 120, 4, 111_312.4, 2.0, 11_234_567_890)
    console = Console(
        file=io.StringIO(), width=width, record=True, force_terminal=True, color_system="standard"
    )
    clock = Clock()
    monkeypatch.setattr(terminal, "time", clock)
    console.print(terminal._Line(1200, 3000, lambda: terminal._parts(step, 3672.0, clock.now - 3)))
    line = console.export_text()
    assert line.count("\n") == 1
    assert cell_len(line.rstrip("\n")) == width
    assert sum(line.count(piece) for piece in "━╸╺") >= terminal.MIN_BAR_WIDTH
    units = ("step", "1200/3000", "loss", "lr", "tokens/s", "3s", "eta", "GB")
    assert " ".join(word for word in line.split() if word in units) == expected


# Other progress


def test_quick_work_shows_nothing() -> None:
    stream = io.StringIO()
    with progress("reading", stream=stream) as report:
        report(10, 10)
    assert stream.getvalue() == ""


def test_slow_work_shows_a_line_at_the_start_and_one_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafit.observe.progress.QUIET_SECONDS", 0.0)
    monkeypatch.setattr("lorafit.observe.progress.time", Clock())  # it takes 0 s, on any machine
    stream = io.StringIO()
    with progress("reading [red]\x1b[2J", stream=stream) as report:
        wait_for(stream, "...")
        report(1, 2)
    assert stream.getvalue() == "reading [red]\\u001b[2J ...\nreading [red]\\u001b[2J: done in 0s\n"

    def failing() -> None:
        with progress("reading", stream=stream):
            wait_for(stream, "reading ...")
            raise ValueError

    with pytest.raises(ValueError):
        failing()
    assert stream.getvalue().endswith("reading ...\n")


def test_slow_work_shows_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafit.observe.progress.QUIET_SECONDS", 0.0)
    monkeypatch.setattr("lorafit.observe.progress.time", Clock())  # it takes 0 s, on any machine
    screen = Screen()
    with progress("tokenising", stream=screen) as report:
        report(2, 8)
        wait_for(screen, " 25%")
    assert screen.getvalue().endswith("tokenising: done in 0s\n")
    assert SHOW_CURSOR in screen.getvalue()


def wait_for(stream: io.StringIO, text: str) -> None:
    until(lambda: text in stream.getvalue())


# Tables and answers


def test_table_in_a_pipe_has_whole_rows() -> None:
    stream = io.StringIO()
    table(["run", "loss"], [["a" * 300, "1.8"], ["[red]b\x1b[31m", ""]], stream=stream)
    lines = stream.getvalue().splitlines()
    assert [line.split() for line in lines[2:]] == [["a" * 300, "1.8"], ["[red]b\\u001b[31m"]]


@pytest.mark.parametrize("width", [30, 60, 80, 200])
def test_a_table_on_a_terminal_cuts_no_word(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns where all words fit, else a list for each row, as for the nine columns of `lorafit runs` in 80."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    headers = ["run", "model", "state", "held-out", "started", "learned"]
    row = ["runs/a-run-of-mine", "/some/where/model", "finished", "1.290", "2026-11-30 17:48", ""]
    screen = Screen()
    table(headers, [row, row], stream=screen)
    text = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())
    words = [word for cell in row for word in cell.split()]
    assert sorted(word for word in text.split() if word in words) == sorted(2 * words)
    assert ("held-out  1.290" in text) == (width < 100)
    assert ("learned" in text) == (width >= 100)  # an empty cell is left out of a list
    assert max(cell_len(line.rstrip()) for line in text.splitlines()) <= width


def test_a_closed_pipe_ends_no_run_and_is_told_to_a_command() -> None:
    """As under `lorafit train 2>&1 | head`: rich would end the process."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", buffering=1) as pipe:
        observe = Terminal(pipe)
        for _ in range(3):
            observe(Message("a line"))
        observe.close()
        with pytest.raises(BrokenPipeError):
            print_line(console_of(pipe), "a line")
        with contextlib.suppress(BrokenPipeError):
            pipe.close()


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_answers_fit_and_are_whole(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    stream = io.StringIO()
    base, tuned = "빨강 파랑 노랑 [red]x[/red] " * 8, "the sky " * 12 + "s" * 200
    side_by_side("세 가지 색은?", base, tuned, stream=stream)
    text = stream.getvalue()
    assert max(cell_len(line) for line in text.splitlines()) <= width
    for word, count in (("빨강", 8), ("[red]x[/red]", 8), ("sky", 12), ("세 가지 색은?", 1)):
        assert text.count(word) == count
    titles = [line.split() for line in text.splitlines() if {"base", "tuned"} & set(line.split())]
    assert titles == ([["base", "tuned"]] if width >= 80 else [["base"], ["tuned"]])


@pytest.mark.parametrize(
    ("hostile", "left"),
    [
        ("a\x1b[31mred\x1b[0m", "ared"),
        ("a\x1b]0;title\x07b", "ab"),
        ("a\x1b]8;;http://x\x1b\\b", "ab"),
        ("a\x1b]0;never ended", "a0;never ended"),
        ("a\x9b2Jb\x07\x08\x00c", "abc"),
        ("over\rwritten", "overwritten"),
        ("\u202eevil\u2066", "evil"),
        ("[bold]b[/bold] :smile:", "[bold]b[/bold] :smile:"),
        ("[/not a tag] 100% \\[x]", "[/not a tag] 100% \\[x]"),
    ],
)
def test_model_text_is_shown_and_not_obeyed(hostile: str, left: str) -> None:
    for stream in (io.StringIO(), Screen()):
        side_by_side("q", hostile, "fine", stream=stream)
        assert left in stream.getvalue()
        assert "title" not in stream.getvalue()
        assert "\u202e" not in stream.getvalue()
    assert printable(f"{hostile}\r\n\t한글") == f"{left}\n\t한글"


def test_a_narrow_encoding_does_not_stop_the_program() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    side_by_side("질문", "답", "ok", stream=stream)
    table(["run"], [["실행"]], stream=stream)
    Terminal(stream)(Message("경고", "warning"))
    stream.flush()
    assert b"warning: ??" in raw.getvalue()


@pytest.mark.parametrize(("verdict", "said"), [("pass", ""), ("warn", "warning: "), ("fail", "error: ")])
def test_a_proof_is_told_in_plain_lines(verdict: str, said: str) -> None:
    stream = io.StringIO()
    faults = ["only 1 of 20 ended\x1b[2J"] if said else []
    Terminal(stream)(Proved(verdict, ["28 of 28 changed", "loss 2 -> 1"], faults, 3.2))  # type: ignore[arg-type]
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["proof  28 of 28 changed", "proof  loss 2 -> 1  (3s)"]
    assert lines[2:3] == ([f"{said}only 1 of 20 ended\\u001b[2J"] if said else [])
    assert ("the adapter is kept" in stream.getvalue()) == (verdict == "fail")


# Words are never cut


SENTENCE = (
    "warning: so many teaching rows say the same that a run of 1m 28s learns one answer by heart (rows.json)"
)


@pytest.mark.parametrize("width", [60, 100, 200])
def test_lines_are_wrapped_between_words_on_a_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    path = "/a/path/that/is/longer/than/the/terminal/" + "folder/" * width
    screen = Screen()
    with closing(Terminal(screen)) as observe:
        observe(Message(SENTENCE))
        observe(Message(f"report {path}"))
    print_verdicts([("warn", "rows", SENTENCE)], stream=screen)
    shown = printable(screen.getvalue())
    assert shown.split() == [*SENTENCE.split(), "report", path, "warn", "rows", *SENTENCE.split()]
    for line in shown.splitlines():
        assert cell_len(line) <= width or line.strip() == path


def test_a_pipe_gets_whole_lines_and_tables_of_a_hundred_columns() -> None:
    stream = io.StringIO()
    with closing(Terminal(stream)) as observe:
        observe(Message(SENTENCE * 3))
    assert stream.getvalue() == SENTENCE * 3 + "\n"
    stream = io.StringIO()
    table(["key", "what it does"], [["lora.rank", SENTENCE * 3], ["a", "b"]], stream=stream)
    assert max(map(len, stream.getvalue().splitlines())) <= 100
    assert " ".join(stream.getvalue().split()).count("the same that a run of 1m 28s") == 3
