"""`lorafit chat`: a conversation with a run, an adapter or a base model, in a terminal or through a pipe."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorafit.cli import options
from lorafit.cli.output import load_torch, put_line, put_text
from lorafit.storage.safe_read import read_stdin_lines

if TYPE_CHECKING:
    from lorafit.infer.continuous_batch import GeneratedToken
    from lorafit.infer.conversation import ChatPrompt, Conversation
    from lorafit.infer.model import Model
    from lorafit.infer.sampling import Sampling

_HELP = """\
/base            show base and tuned answers side by side, on or off
/system [TEXT]   set the system prompt; without TEXT, show it
/reset           remove all turns of the conversation
/help            show this help
/quit            end the chat, as Ctrl-D does
Ctrl-C stops an answer. \"\"\" begins and ends a question of several lines."""

_STOPPED = "stopped by Ctrl-C"


def chat(
    source: options.SourceArgument,
    adapter: options.AdapterOption = None,
    base: options.BaseOption = False,
    compare: options.CompareOption = False,
    system: options.SystemOption = None,
    max_tokens: options.MaxTokensOption = 512,
    temperature: options.TemperatureOption = 0.0,
    top_k: options.TopKOption = 0,
    top_p: options.TopPOption = 1.0,
    seed: options.SeedOption = 0,
    device: options.DeviceOption = "auto",
    quantize: options.QuantizeOption = None,
    offline: options.OfflineOption = False,
    other_base: options.OtherBaseOption = False,
) -> None:
    """Chat with a model, with the prompt template and the stop tokens of its training.

    lorafit chat runs/tinyllama

    echo "What is a llama?" | lorafit chat runs/tinyllama
    """
    load_torch()
    from lorafit.infer.conversation import Conversation
    from lorafit.infer.model import load
    from lorafit.infer.sampling import Sampling

    model = load(
        source, adapter=adapter, device=device, offline=offline, quantize=quantize, other_base=other_base
    )
    if base or compare:
        model.require_adapter(source)
    sampling = Sampling(temperature, top_k, top_p, seed)
    conversation = Conversation(model, max_tokens, system)
    Session(model, conversation, sampling, max_tokens, base, compare).run(source)


class Interrupt:
    """Ctrl-C raises KeyboardInterrupt in a `with` block of this object. Elsewhere it waits for the next such block."""

    def __init__(self) -> None:
        self._raises = self._waits = False

    @contextlib.contextmanager
    def handling(self) -> Iterator[None]:
        """Handle Ctrl-C by this object. Where it is ignored (as under nohup), it stays ignored."""
        before = signal.getsignal(signal.SIGINT)
        if before is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def __enter__(self) -> None:
        self._raises = True
        self.check()

    def __exit__(self, kind: object, *_: object) -> None:
        self._raises = False
        if kind is KeyboardInterrupt:
            self._waits = False

    def check(self) -> None:
        """Raise the KeyboardInterrupt of a Ctrl-C that waits, or that was raised where exceptions are ignored."""
        if self._waits:
            self._waits = self._raises = False
            raise KeyboardInterrupt

    def _handle(self, *_: object) -> None:
        self._waits = True
        if self._raises:
            self._raises = False  # what follows a KeyboardInterrupt is not interrupted
            raise KeyboardInterrupt


@dataclass
class Session:
    """The chat: reads questions, prints answers to stdout and everything else to stderr."""

    model: Model
    conversation: Conversation
    sampling: Sampling  # of the next answer
    max_tokens: int
    base: bool
    compare: bool

    def __post_init__(self) -> None:
        self.is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self.interrupt = Interrupt()
        self._lines = read_stdin_lines(sys.stdin)

    def run(self, source: str) -> None:
        """Until /quit or the end of the input."""
        if self.is_terminal:
            context = self.model.network.arch.max_position_embeddings
            kind = "base" if self.base or not self.model.has_adapter else "tuned"
            self._note(f"{source} ({kind}), {context:,} tokens of context; /help lists the commands")
        if not self.conversation.remembers:
            self._note(self.conversation.note)
        with self.interrupt.handling():
            for line in self._questions():
                if not line.strip():
                    continue
                if line.startswith("/"):
                    if not self._command(line.strip()):
                        return
                    continue
                self._answer(line)

    def _questions(self) -> Iterator[str]:
        """Lines, or the text between two lines of three quotes."""
        lines: list[str] | None = None
        while True:
            try:
                with self.interrupt:
                    line = self._read("" if lines is None else "... ")
            except EOFError:
                if self.is_terminal:
                    put_line()
                if lines:
                    yield "\n".join(lines)
                return
            except KeyboardInterrupt:
                put_line()
                self._note("/quit or Ctrl-D leaves")
                lines = None
                continue
            if line.strip() == '"""':
                if lines is not None:
                    yield "\n".join(lines)
                lines = [] if lines is None else None
            elif lines is not None:
                lines.append(line)
            else:
                yield line

    def _read(self, prompt: str) -> str:
        if self.is_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (input() then has line editing and a history)
            return input(prompt or "> ")
        line = next(self._lines, None)
        if line is None:
            raise EOFError
        return line

    def _command(self, line: str) -> bool:
        """Execute a command. Returns False for the end of the chat."""
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        match word:
            case "/quit" | "/exit":
                return False
            case "/help":
                self._note(*_HELP.splitlines())
            case "/reset":
                self.conversation.reset()
                self._note("all turns are removed")
            case "/base" if not self.model.has_adapter:
                self._note("there is no adapter here to compare with its base")
            case "/base":
                self.compare = not self.compare
                self._note("base and tuned side by side" if self.compare else "tuned alone")
                self.base = False
            case "/system":
                if rest:
                    self.conversation.system = rest
                own = self.model.renderer.contract.system
                self._note(f"system prompt: {self.conversation.system or own or 'none'}")
            case _:
                self._note(
                    f"there is no command {word}: /help lists them; a space in front makes it a question"
                )
        return True

    def _answer(self, question: str) -> None:
        from lorafit.errors import LorafitError

        try:
            prompt = self.conversation.ask(question)
        except LorafitError as error:
            self._note(*str(error).splitlines())
            return
        if prompt.num_dropped:
            turns = "the oldest turn is" if prompt.num_dropped == 1 else f"{prompt.num_dropped} turns are"
            self._note(f"{turns} dropped from the conversation: the context is full")
        if not self.is_terminal:
            put_text(f"> {question}")
        reply = Reply(self, prompt)
        self.conversation.answered(prompt, reply.show().strip())
        self.sampling = replace(self.sampling, seed=self.sampling.seed + 1)  # a repeated question differs
        if self.is_terminal or reply.fault:
            self._note(reply.summary())
        put_line()

    def _note(self, *lines: str) -> None:
        from lorafit.observe.console import note

        for text in lines:
            note(text)


class Reply:
    """One answer. `fault` is the reason why it is not complete."""

    def __init__(self, session: Session, prompt: ChatPrompt) -> None:
        self.fault = ""
        self._session, self._prompt = session, prompt
        self._texts = {False: "", True: ""}  # of the tuned model, of the base
        self._num_tokens, self._end, self._seconds = 0, "", 0.0

    def show(self) -> str:
        """Print the answer as it comes, if the session compares beside that of the base model; returns it.

        The base model does not answer if the tuned one was stopped.
        """
        from lorafit.observe.console import flowing, growing_side_by_side

        session, texts = self._session, self._texts
        if not session.compare:
            with flowing() as write:
                self._take(session.base, write)
            return texts[session.base]
        with growing_side_by_side() as draw:
            for base in (False, True):
                if self.fault != _STOPPED:
                    self._take(base, lambda _: draw(texts[True], texts[False]))
        return texts[False]

    def _take(self, base: bool, show: Callable[[str], None]) -> None:
        """Add the pieces of a model's answer and call `show` with each, until its end or Ctrl-C.

        Ctrl-C may have come before the first piece, since the question was read.
        """
        session, started, before = self._session, time.perf_counter(), self._num_tokens
        pieces = session.model.stream(
            self._prompt.messages,
            max_tokens=session.max_tokens,
            sampling=session.sampling,
            base=base,
            watch=self._watch,
        )
        try:
            with session.interrupt, contextlib.closing(pieces):
                for piece in pieces:
                    self._texts[base] += piece
                    show(piece)
                    session.interrupt.check()
            if self._end == "length":
                is_long = self._num_tokens - before >= session.max_tokens
                fault = "cut: --max-tokens" if is_long else "cut: the context is full"
                self.fault = self.fault or (f"base {fault}" if base and session.compare else fault)
        except KeyboardInterrupt:
            self.fault = _STOPPED
        finally:
            self._seconds += time.perf_counter() - started

    def summary(self) -> str:
        """Numbers of tokens, speed, and the reason of an early end."""
        speed = f"{self._num_tokens / max(self._seconds, 1e-6):.1f} tokens/s"
        return "  ".join(part for part in (f"{self._num_tokens} tokens", speed, self.fault) if part)

    def _watch(self, token: GeneratedToken) -> None:
        self._num_tokens += token.end != "stop"
        self._end = token.end
