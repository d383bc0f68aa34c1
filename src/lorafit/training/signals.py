"""Signals: the first SIGINT, SIGTERM or SIGHUP ends the run after the current step, the second at once; USR1 saves."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType, TracebackType
from typing import Any

from lorafit.observe.events import Message, Observer
from lorafit.redact import shell
from lorafit.run_dir import RunDirectory

_STOP = ("SIGINT", "SIGTERM", "SIGHUP")  # keyboard, a scheduler's pre-emption, a closed terminal
_SAVE = "SIGUSR1"
_Handler = Callable[[int, FrameType | None], None]


@contextlib.contextmanager
def outside_steps(observe: Observer) -> Iterator[None]:
    """Before the first step and after the last there is nothing to save: a signal stops at once, by a KeyboardInterrupt
    with its name; USR1 gives a message. By default all but SIGINT would end the process without a message.
    """

    def on_stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(f"{_name(number)}: stopped")

    def on_save(number: int, frame: FrameType | None) -> None:
        observe(Message("SIGUSR1: no step is under way; what was trained is saved"))

    before = _install(on_stop, on_save)
    try:
        yield
    finally:
        _put_back(before)


class Requests:
    """A context manager that records signals as flags, which the loop reads after every step."""

    def __init__(
        self, observe: Observer, *, patient: bool = False, abandoned: Callable[[], bool] = lambda: False
    ) -> None:
        """`patient`: a second signal is ignored, because schedulers and torchrun's agent send the first twice.

        `abandoned` is called after every step: whether the agent has ended, which requests a stop too.
        """
        self._observe = observe
        self._patient = patient
        self._abandoned = abandoned
        self._stop = self._save = False
        self._before: dict[int, Any] = {}

    def stop(self) -> bool:
        """Whether a stop was requested."""
        if not self._stop and self._abandoned():
            self._stop = True
            self._observe(Message("the agent of this process has ended: saving after this step", "warning"))
        return self._stop

    def any(self) -> bool:
        """Whether a stop or a checkpoint is requested."""
        return self.stop() or self._save

    def save(self) -> bool:
        """Whether a checkpoint was requested since the last call."""
        requested, self._save = self._save, False
        return requested

    def __enter__(self) -> Requests:
        self._before = _install(self._on_stop, self._on_save)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _put_back(self._before)

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self._save = True

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        if self._stop and self._patient:
            return
        if self._stop:
            raise KeyboardInterrupt(f"{_name(number)}: stopped at once")
        self._stop = True
        once_more = "" if self._patient else "; once more stops at once"
        self._observe(Message(f"{_name(number)}: saving after this step{once_more}", "warning"))


@contextlib.contextmanager
def with_way_back(run: RunDirectory) -> Iterator[None]:
    """Add how `run` continues to the message of a KeyboardInterrupt of the block."""
    try:
        yield
    except KeyboardInterrupt as stop:
        again = f"continue with: {shell('lorafit', 'train', '--resume', run.path)}"
        raise KeyboardInterrupt(f"{stop or 'interrupted'}; {again}") from None


def _name(number: int) -> str:
    """A signal as the user knows it."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def _install(on_stop: _Handler, on_save: _Handler) -> dict[int, Any]:
    """Set the handlers; returns the earlier ones. Python allows none outside of the main thread.

    A signal that is ignored stays ignored: `nohup` ignores SIGHUP, and a script's `&` ignores SIGINT.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name, handler in [*((name, on_stop) for name in _STOP), (_SAVE, on_save)]:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    return before


def _put_back(before: Mapping[int, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)
