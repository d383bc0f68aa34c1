"""Ctrl-C and friends: the first asks the run to end after the current step, the second stops at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from lorafit.observe.events import Note, Observer

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # keyboard, a scheduler's pre-emption, a closed terminal


class StopRequest:
    """A context manager that turns stop signals into a question that the loop asks after every step."""

    def __init__(self, observe: Observer) -> None:
        self._observe = observe
        self._asked = False
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        """Whether somebody asked to stop."""
        return self._asked

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for name in _NAMES:
                if hasattr(signal, name):
                    number = getattr(signal, name)
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        name = signal.Signals(number).name
        self._observe(Note(f"{name}: saving after this step; once more stops at once", "warning"))
