"""`lorafit chat`: a conversation with a run, an adapter or a base model, at a terminal or through a pipe."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lorafit.storage.safe_read import read_stdin_lines

if TYPE_CHECKING:
    from lorafit.infer.conversation import Asked, Conversation
    from lorafit.infer.engine import Token
    from lorafit.infer.model import Model
    from lorafit.infer.sampling import Sampling

_HELP = """\
/base            base and tuned model side by side, on or off
/system [TEXT]   set the system prompt; without TEXT, show it
/reset           forget the conversation
/help            this
/quit            leave, as Ctrl-D does
Ctrl-C stops an answer. \"\"\" begins and ends a question of several lines."""

_STOPPED = "stopped by Ctrl-C"


def chat(
    source: Annotated[
        str, typer.Argument(help="Run directory, PEFT adapter folder, model folder or hub id.")
    ],
    adapter: Annotated[
        str | None, typer.Option(help="PEFT adapter to put on a base model.", show_default=False)
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Leave the adapter out.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Begin with both answers side by side.")] = False,
    system: Annotated[
        str | None, typer.Option(help="System prompt instead of the run's.", show_default=False)
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from the k likeliest tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from this share of the mass.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    quantize: Annotated[
        Literal["none", "int8", "nf4", "fp8"] | None,
        typer.Option(help="How the base is held; a run is loaded as it was trained.", show_default=False),
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Never open a connection.")] = False,
) -> None:
    """Talk with a model; it is asked as it was trained, and stops where it stops.

    lorafit chat runs/tinyllama

    echo "What is a llama?" | lorafit chat runs/tinyllama
    """
    from lorafit.errors import ConfigError
    from lorafit.infer.conversation import Conversation
    from lorafit.infer.model import load
    from lorafit.infer.sampling import Sampling

    model = load(source, adapter=adapter, device=device, offline=offline, quantize=quantize)
    if (base or compare) and not model.has_adapter:
        raise ConfigError(
            f"`{source}` has no adapter, it is a base model", hint="leave --base and --compare out"
        )
    sampling = Sampling(temperature, top_k, top_p, seed)
    conversation = Conversation(model, max_tokens, system)
    Session(model, conversation, sampling, max_tokens, base=base, compare=compare).run(source)


class Session:
    """The talk itself: questions in, answers to stdout, everything else to stderr."""

    def __init__(
        self,
        model: Model,
        conversation: Conversation,
        sampling: Sampling,
        max_tokens: int,
        *,
        base: bool,
        compare: bool,
    ) -> None:
        self.model, self.conversation = model, conversation
        self.sampling, self.max_tokens = sampling, max_tokens
        self.base, self.compare = base, compare
        self.is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._lines = read_stdin_lines(sys.stdin)
        self._num_asked = 0

    def run(self, source: str) -> None:
        """Until /quit or the end of the input."""
        if self.is_terminal:
            context = self.model.network.arch.max_position_embeddings
            kind = "base" if self.base or not self.model.has_adapter else "tuned"
            self._note(f"{source} ({kind}), {context:,} tokens of context; /help lists the commands")
        if not self.conversation.remembers:
            template = self.model.renderer.contract.template
            self._note(f"the {template} template knows no conversations: each question is asked by itself")
        for line in self._questions():
            if not line.strip():
                continue
            if line.startswith("/"):
                if not self._command(line.strip()):
                    return
                continue
            self._answer(line)

    def _questions(self) -> Iterator[str]:
        """Lines, or what stands between two lines of three quotes."""
        lines: list[str] | None = None
        while True:
            try:
                line = self._read("" if lines is None else "... ")
            except EOFError:
                if self.is_terminal:
                    typer.echo()
                if lines:
                    yield "\n".join(lines)
                return
            except KeyboardInterrupt:
                typer.echo()
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
                import readline  # noqa: F401  (input() then edits lines and has a history)
            return input(prompt or "> ")
        line = next(self._lines, None)
        if line is None:
            raise EOFError
        return line

    def _command(self, line: str) -> bool:
        """Do what a command says; False to leave."""
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        match word:
            case "/quit" | "/exit":
                return False
            case "/help":
                self._note(_HELP)
            case "/reset":
                self.conversation.reset()
                self._note("forgotten")
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
                    f"there is no command {word}: /help lists them; a blank in front makes it a question"
                )
        return True

    def _answer(self, question: str) -> None:
        from lorafit.errors import LorafitError
        from lorafit.redact import printable

        try:
            asked = self.conversation.ask(question)
        except LorafitError as error:
            self._note(str(error))
            return
        if asked.num_dropped:
            turns = "the oldest turn does" if asked.num_dropped == 1 else f"{asked.num_dropped} turns do"
            self._note(f"{turns} not fit any more and will not be read again")
        if not self.is_terminal:
            typer.echo(f"> {printable(question)}")
        reply = Reply(self, asked)
        if self.compare:
            reply.compare()
        else:
            reply.show()
        self.conversation.answered(asked, reply.text.strip())
        self._num_asked += 1
        if self.is_terminal or reply.fault:
            self._note(reply.summary())
        typer.echo()

    def draws(self) -> Sampling:
        """The sampling of the next answer: the same question asked twice is drawn anew."""
        import dataclasses

        return dataclasses.replace(self.sampling, seed=self.sampling.seed + self._num_asked)

    def _note(self, text: str) -> None:
        from lorafit.observe.console import note

        note(text)


class Reply:
    """One answer as it is shown. `text` is what of it there was, `fault` why it is not whole."""

    def __init__(self, session: Session, asked: Asked) -> None:
        self.text, self.fault = "", ""
        self._session, self._asked = session, asked
        self._num_tokens, self._end, self._seconds = 0, "", 0.0

    def show(self) -> None:
        """Print it as it comes."""
        from lorafit.observe.console import flowing

        with flowing() as write, self._answering(self._session.base) as pieces:
            for piece in pieces:
                self.text += piece
                write(piece)

    def compare(self) -> None:
        """Print it beside what the base model says, which is not asked any more where this was stopped."""
        from lorafit.observe.console import growing_side_by_side

        base = ""
        with growing_side_by_side() as draw:
            with self._answering(base=False) as pieces:
                for piece in pieces:
                    self.text += piece
                    draw(base, self.text)
            if self.fault == _STOPPED:
                return
            with self._answering(base=True) as pieces:
                for piece in pieces:
                    base += piece
                    draw(base, self.text)

    @contextlib.contextmanager
    def _answering(self, base: bool) -> Iterator[Iterator[str]]:
        """The pieces of an answer, until its end or Ctrl-C, which may come while a piece is made or drawn."""
        session, started, before = self._session, time.perf_counter(), self._num_tokens
        pieces = session.model.stream(
            self._asked.messages,
            max_tokens=session.max_tokens,
            sampling=session.draws(),
            base=base,
            watch=self._watch,
        )
        try:
            with contextlib.closing(pieces):
                yield pieces
            if self._end == "length":
                is_long = self._num_tokens - before >= session.max_tokens
                fault = "cut: --max-tokens" if is_long else "cut: the context is full"
                self.fault = self.fault or (f"base {fault}" if base and session.compare else fault)
        except KeyboardInterrupt:
            self.fault = _STOPPED
        finally:
            self._seconds += time.perf_counter() - started

    def summary(self) -> str:
        """Counts, speed, and what is missing."""
        speed = f"{self._num_tokens / max(self._seconds, 1e-6):.1f} tokens/s"
        return "  ".join(part for part in (f"{self._num_tokens} tokens", speed, self.fault) if part)

    def _watch(self, token: Token) -> None:
        self._num_tokens += token.end != "stop"
        self._end = token.end
