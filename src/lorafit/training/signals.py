"""Ctrl-C and friends: the first asks the run to end after the current step, the second stops at once; USR1 saves."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from lorafit.observe.events import Note, Observer

_STOP = ("SIGINT", "SIGTERM", "SIGHUP")  # keyboard, a scheduler's pre-emption, a closed terminal
_SAVE = "SIGUSR1"


class Requests:
    """A context manager that turns signals into questions that the loop asks after every step."""

    def __init__(self, observe: Observer) -> None:
        self._observe = observe
        self._stop = self._save = False
        self._before: dict[int, Any] = {}

    def stop(self) -> bool:
        """Whether somebody asked to stop."""
        return self._stop

    def save(self) -> bool:
        """Whether somebody asked for a checkpoint since the last call."""
        asked, self._save = self._save, False
        return asked

    def __enter__(self) -> Requests:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for name, handler in [*((name, self._on_stop) for name in _STOP), (_SAVE, self._on_save)]:
                if hasattr(signal, name):
                    number = getattr(signal, name)
                    self._before[number] = signal.signal(number, handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self._save = True

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        if self._stop:
            raise KeyboardInterrupt
        self._stop = True
        name = signal.Signals(number).name
        self._observe(Note(f"{name}: saving after this step; once more stops at once", "warning"))
