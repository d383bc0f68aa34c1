"""Streams and events of a device without a GPU, and the order of their operations.

Operations are computed when they are called, so a missing wait would not be seen in the numbers. Each stream has a
vector clock instead: an operation that touches memory must come after every operation of another stream that wrote it,
and one that writes it after every one that read it. Otherwise RaceError.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


class RaceError(RuntimeError):
    """Two operations on the same memory, of which one writes, have no order."""


Clock = dict[int, int]  # by the stream's id, its last operation that is known to be done


@dataclass
class _Accesses:
    written: Clock = field(default_factory=dict)
    read: Clock = field(default_factory=dict)


class Event:
    def __init__(self, *words: object, **named: object) -> None:
        self.clock: Clock = {}
        self.launched = 0

    def record(self, stream: Stream | None = None) -> None:
        self.clock = dict((stream or streams.current).clock)
        self.launched = streams.launched

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        streams.stalls += self.launched == streams.launched


class Stream:
    def __init__(self, *words: object, **named: object) -> None:
        self.clock: Clock = {}
        streams.is_used = True

    def wait_event(self, event: Event) -> None:
        self.clock = {
            stream: max(self.clock.get(stream, 0), event.clock.get(stream, 0))
            for stream in {*self.clock, *event.clock}
        }

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        streams.stalls += 1


class Streams:
    """The streams of the device. Memory that only the default stream touches needs no record.

    `launched` counts operations, `stalls` the times that the host waited for the last one: then the device has nothing
    to do.
    """

    def __init__(self) -> None:
        self.is_used = False

    def reset(self) -> None:
        self.launched = self.stalls = 0
        self.default = self.current = Stream()
        self.is_used = False  # since a program made a stream of its own
        self._accesses: dict[int, _Accesses] = {}

    @contextmanager
    def using(self, stream: Stream | None) -> Iterator[None]:
        before, self.current = self.current, stream or self.current
        try:
            yield
        finally:
            self.current = before

    def touch(self, func: Any, tensors: Any, written: Any) -> None:
        """Record an operation on `tensors`, of which it writes `written`, on the current stream; raise RaceError."""
        self.launched += not func.is_view
        if not self.is_used or func.is_view:
            return
        here, name = self.current, func._schema.name
        now = here.clock[id(here)] = here.clock.get(id(here), 0) + 1
        changed = {_key(tensor) for tensor in written}
        for tensor in tensors:
            key = _key(tensor)
            if key not in self._accesses:
                if here is self.default:
                    continue
                self._accesses[key] = _Accesses()
                weakref.finalize(tensor.untyped_storage(), self._accesses.pop, key, None)
            past = self._accesses[key]
            for others in (past.written, past.read) if key in changed else (past.written,):
                late = [other for other, tick in others.items() if here.clock.get(other, 0) < tick]
                if late:
                    raise RaceError(f"{name} does not wait for another stream")
            (past.written if key in changed else past.read)[id(here)] = now


streams = Streams()
streams.reset()


def written_by(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that an operation changes."""
    changed = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            changed += value if isinstance(value, list | tuple) else [value]
    return [tensor for tensor in changed if isinstance(tensor, Tensor)]


def pinned(tensor: Tensor) -> Tensor:
    """In the place of Tensor.pin_memory: a mark."""
    tensor._is_pinned_here = True  # type: ignore[attr-defined]
    return tensor


def is_pinned(x: Tensor) -> bool:
    """Whether a tensor of the CPU is marked as pinned (a device without a GPU pins nothing)."""
    return getattr(x, "_is_pinned_here", False)


def waits_for_host(name: str, args: Any, kwargs: Any, source: Tensor) -> bool:
    """Whether a copy between the host and the device waits."""
    positional = args[2] if name == "copy_" and len(args) > 2 else False
    return not ((positional or kwargs.get("non_blocking")) and is_pinned(source))


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


PATCHES: dict[str, Any] = {
    "Stream": Stream,
    "Event": Event,
    "current_stream": lambda device=None: streams.current,
    "default_stream": lambda device=None: streams.default,
    "stream": streams.using,
}
