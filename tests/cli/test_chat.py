"""`lorafit chat` at a terminal and through a pipe, and `lorafit generate` from a file."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.command import Cli
from tests.tiny_models import random_network, write_adapter, write_model
from tests.waiting import HANGS, until

from lorafit.infer.conversation import Conversation
from lorafit.infer.model import Model, load
from lorafit.model.lora import LoraSpec


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("chat")
    base = write_model(home / "base", max_position_embeddings=4096)
    spec = LoraSpec(4, 8.0, 0.0, ("all-linear",), False)
    return write_adapter(home / "tuned", random_network(max_position_embeddings=4096), spec, base=str(base))


@pytest.fixture
def cli(cli: Cli) -> Cli:
    """The command line on the CPU."""
    return lambda *words, stdin="": cli(*words, "--device", "cpu", stdin=stdin)


def asked(out: str) -> list[str]:
    return re.findall(r"^> (.*)$", out, re.MULTILINE)


def test_a_pipe_gets_the_answers_and_stderr_the_rest(cli: Cli, adapter: Path) -> None:
    lines = [
        "Hi",
        "",
        "/system Be brief.",
        "And?",
        "/nope",
        "/reset",
        '"""',
        "one",
        "two",
        '"""',
        "/quit",
        "never",
    ]
    code, out, err = cli("chat", adapter, "--max-tokens", 9, stdin="\n".join(lines) + "\n")
    assert code == 0
    assert asked(out) == ["Hi", "And?", "one"]
    assert "\ntwo\n" in out
    assert "never" not in out
    assert "system prompt: Be brief." in err
    assert "there is no command /nope" in err
    assert "all turns are removed" in err
    assert "cut: --max-tokens" in err
    assert "\x1b" not in out + err


def test_an_answer_is_what_the_model_says_to_all_that_was_said(cli: Cli, adapter: Path) -> None:
    from lorafit.data.formats import Message
    from lorafit.redact import printable

    model = load(adapter, device="cpu")
    first = model.generate(["Hi"], max_tokens=7)[0].text
    turns = [Message("user", "Hi"), Message("assistant", first), Message("user", "And?")]
    second = model.generate([turns], max_tokens=7)[0].text
    _, out, _ = cli("chat", adapter, "--max-tokens", 7, stdin="Hi\nAnd?\n")
    assert out == f"> Hi\n{printable(first)}\n\n> And?\n{printable(second)}\n\n"
    _, base, _ = cli("chat", adapter, "--max-tokens", 7, "--base", stdin="Hi\n")
    assert base != f"> Hi\n{printable(first)}\n\n"
    _, both, err = cli("chat", adapter, "--max-tokens", 7, stdin="/base\nHi\n/base\n")
    assert re.search(r"base +tuned", both)
    assert "base and tuned side by side" in err
    assert "tuned alone" in err


def test_samples_follow_the_seed_and_differ_when_asked_again(cli: Cli, adapter: Path) -> None:
    def talk(seed: int) -> str:
        words = ("chat", adapter, "--max-tokens", 9, "--temperature", 1.5, "--seed", seed)
        return cli(*words, stdin="Hi\n/reset\nHi\n")[1]

    assert talk(1) == talk(1) != talk(2)
    one, two = talk(1).split("> Hi\n")[1:]
    assert one != two


def test_turns_that_no_longer_fit_are_left_out_and_said(cli: Cli, tmp_path: Path) -> None:
    base = write_model(tmp_path / "short", max_position_embeddings=128)
    questions = [letter * 40 for letter in "abc"]
    code, _, err = cli(
        "chat", base, "--max-tokens", 5, stdin="\n".join([*questions, "d" * 500, "/base"]) + "\n"
    )
    assert code == 0
    assert "the oldest turn is dropped from the conversation" in err
    assert "the question has" in err
    assert "there is no adapter here" in err


def test_a_template_without_conversations_says_so(cli: Cli, tmp_path: Path) -> None:
    base = write_model(tmp_path / "plain", chat=False, max_position_embeddings=512)
    code, out, err = cli("chat", base, "--max-tokens", 3, stdin="Hi\nAnd?\n")
    assert (code, asked(out)) == (0, ["Hi", "And?"])
    assert "the alpaca template knows no conversations" in err
    code, _, err = cli("chat", base, "--compare")
    assert code == 2
    assert "has no adapter" in err


@pytest.mark.parametrize(
    "moment", ["Conversation.ask", "Model.stream", "Conversation.answered"], ids=["asked", "begun", "ended"]
)
def test_control_c_between_the_question_and_the_first_token_stops_that_answer(
    moment: str, cli: Cli, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes when `moment` is called for the first time. After the answer's end there is none to stop: a hint."""
    owner, name = {"Model": Model, "Conversation": Conversation}[moment.split(".")[0]], moment.split(".")[1]
    real = getattr(owner, name)

    def interrupted(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(owner, name, real)
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, interrupted)
    before = signal.getsignal(signal.SIGINT)
    code, out, err = cli("chat", adapter, "--max-tokens", 7, stdin="Hi\nAnd?\n")
    assert (code, asked(out)) == (0, ["Hi", "And?"])
    assert signal.getsignal(signal.SIGINT) == before
    if moment == "Conversation.answered":
        assert "/quit or Ctrl-D leaves" in err
        assert "stopped" not in err
        return
    assert [line for line in err.splitlines() if "Ctrl-C" in line] == [
        "0 tokens  0.0 tokens/s  stopped by Ctrl-C"
    ]
    assert out.startswith("> Hi\n\n\n> And?\n")  # no answer, and no trace of the question
    alone = cli("chat", adapter, "--max-tokens", 7, stdin="And?\n")[1]
    assert out.endswith(alone)


CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # what the line editor writes is no answer
_WRITE = ("1", "64")  # write() on x86-64 and on ARM, whose first argument may be 1 too
RETYPE_SECONDS = 15  # without anything new on the screen
ENDLESS = """
from lorafit.cli.main import main
from lorafit.infer.model import Model

def endless(*_, **__):
    yield "so it is "
    while True:
        yield ""

Model.stream = endless
main()
"""


class Terminal:
    """A pseudo-terminal with a chat in it whose answers begin at once and do not end."""

    def __init__(self, *words: object) -> None:
        self.screen = ""
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", ENDLESS, "chat", *map(str, words)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "90"},
        )
        os.close(slave)

    def wait(self, pattern: str) -> str:
        """Everything up to what matches `pattern`, which is taken off the screen; OSError where the chat has ended."""
        while not (match := re.search(pattern, self.screen)):
            assert select.select([self.master], [], [], HANGS)[0], self.screen
            self.screen = CONTROL.sub(
                "", self.screen + os.read(self.master, 65536).decode("utf-8", "replace")
            )
        before, self.screen = self.screen[: match.end()], self.screen[match.end() :]
        return before

    def press(self, text: str, pattern: str) -> str:
        """Type `text` until `pattern` is on the screen: a key between two states of the terminal may be lost."""
        for _ in range(20):
            self.type(text)
            while select.select([self.master], [], [], RETYPE_SECONDS)[0]:
                self.screen += CONTROL.sub("", os.read(self.master, 65536).decode("utf-8", "replace"))
                if re.search(pattern, self.screen):
                    return self.wait(pattern)
        raise AssertionError(self.screen)

    def wait_for_prompt(self) -> None:
        """Return when the prompt is on the screen and the chat sleeps until a key comes.

        Python's line editor notices a signal while it sleeps, and not between the prompt and its sleep.
        """
        self.wait("> ")
        until(self._waits_for_a_key, self.process.poll)

    def _waits_for_a_key(self) -> bool:
        """Whether the chat is in select() on standard input alone (a number of files of 1), where Linux says so."""
        folder = Path(f"/proc/{self.process.pid}")
        if not folder.exists():
            return True
        try:
            call, argument, *_ = (folder / "syscall").read_text().split()
        except OSError:  # it is not shown to this user
            return (folder / "stat").read_text().rpartition(")")[2].split()[0] == "S"
        except ValueError:  # `running`
            return False
        return argument == "0x1" and call not in _WRITE

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())


@pytest.mark.slow
def test_control_c_stops_an_answer_and_not_the_chat(adapter: Path) -> None:
    terminal = Terminal(adapter, "--device", "cpu")
    try:
        terminal.wait(r"context;\s+/help\s+lists\s+the\s+commands")  # a long path wraps the line
        terminal.wait_for_prompt()
        terminal.press("Hi\n", "so it is")  # the answer has begun
        assert "stopped by Ctrl-C" in terminal.press("\x03", r"\d+ tokens .*Ctrl-C")
        terminal.wait_for_prompt()
        terminal.press("\x03", "/quit or Ctrl-D leaves")
        terminal.press("/help\n", "/reset +remove all turns")
        terminal.wait_for_prompt()
        terminal.type("\x04")
        assert terminal.process.wait(HANGS) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)


def test_generate_answers_a_file(cli: Cli, adapter: Path, tmp_path: Path) -> None:
    file, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    rows = [{"prompt": f"Say {number}.", "id": number} for number in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("generate", adapter, "--max-tokens", 5, "--file", file)
    code, out, err = cli(*words, "--output", output)
    assert (code, out) == (0, f"{output}\n"), err
    made = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["input"] for row in made] == rows
    assert [row["index"] for row in made] == list(range(20))
    assert set(made[0]) == {"index", "input", "answer", "stopped", "num_tokens"}
    alone = cli("generate", adapter, "--max-tokens", 5, "--json", "Say 3.")[1]
    assert json.loads(alone)["answer"] == made[3]["answer"]
    assert cli(*words)[1] == output.read_text()
    code, _, err = cli(*words, "--output", output)
    assert code == 2
    assert "exists already" in err
    output.rename(output.with_name("answers.jsonl.part"))
    code, _, err = cli(*words, "--output", output)
    assert code == 2
    assert "answers to other prompts" in err


def test_a_file_goes_with_nothing_else(cli: Cli, adapter: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("Hi\n")
    for words in (
        ("Hi", "--file", file),
        ("--file", file, "--compare"),
        ("Hi", "--output", tmp_path / "a.jsonl"),
    ):
        code, _, err = cli("generate", adapter, *words)
        assert code == 2
        assert "--file" in err
