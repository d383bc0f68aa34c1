"""A queue in front of a batch, and the thread that works it off: first come, first served, bounded, never stuck.

It knows nothing of text or of the web. What happens to tickets is handed to one function, once a pass, on the
scheduler's own thread.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from lorafit.infer.continuous_batch import Batch, Request, Step

_PROMPT_TOKENS = 512  # read between two passes at most, but for a longer first prompt: the others wait for it

Failure = Literal["late", "failed", "stopped"]


class QueueFullError(Exception):
    """No more can wait. `retry_after` is when to try again, in whole seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("the queue is full")
        self.retry_after = retry_after


class StoppedError(Exception):
    """The scheduler takes nothing any more."""


@dataclass(eq=False, slots=True)
class Ticket:
    """One request on its way; `deadline` is on the clock of time.monotonic."""

    request: Request
    deadline: float
    is_cancelled: bool = False
    started: float = 0.0


Event = tuple[Ticket, Step | Failure]


class Scheduler:
    """Works off tickets with `batch`, at most `max_waiting` of them waiting for a slot.

    `deliver` gets the events of a pass: a step of a ticket, or how it failed: `late` past its deadline, `failed`
    where the pass did, `stopped`. After a step with an `end`, a failure or `cancel` nothing more comes of a ticket.
    """

    def __init__(self, batch: Batch, max_waiting: int, deliver: Callable[[list[Event]], None]) -> None:
        self.batch = batch
        self.capacity = batch.num_slots + max_waiting
        self.last_error: BaseException | None = None
        self._deliver = deliver
        self._waiting: deque[Ticket] = deque()
        self._active: set[Ticket] = set()
        self._seconds = 1.0  # that an answer takes, smoothed
        self._stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="lorafit-batch", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Queue all of `tickets` or none. Raises QueueFullError or StoppedError."""
        with self._changed:
            if self._stopping:
                raise StoppedError
            if len(self._active) + len(self._waiting) + len(tickets) > self.capacity:
                raise QueueFullError(self._wait_seconds())
            self._waiting.extend(tickets)
            self._changed.notify()

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Nobody waits for these any more: a place in the queue is free now, a slot before the next pass."""
        with self._changed:
            for ticket in tickets:
                ticket.is_cancelled = True
            self._waiting = deque(ticket for ticket in self._waiting if not ticket.is_cancelled)
            self._changed.notify()

    def load(self) -> tuple[int, int]:
        """(tickets in the batch, tickets that wait)."""
        with self._changed:
            return len(self._active), len(self._waiting)

    def stop(self) -> None:
        """Fail what is left and end the thread; returns when the pass under way is over."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _wait_seconds(self) -> int:
        rounds = 1 + len(self._waiting) / self.batch.num_slots
        return max(1, min(60, round(rounds * self._seconds)))

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._active or self._stopping):
                    self._changed.wait()
                if self._stopping:
                    left = [*self._active, *self._waiting]
                    self._active.clear()
                    self._waiting.clear()
                    break
            events: list[Event] = []
            self._drop_the_unwanted(events)
            self._admit(events)
            self._step(events)
            if events := [event for event in events if not event[0].is_cancelled]:
                self._deliver(events)
        if left:
            self._deliver([(ticket, "stopped") for ticket in left])

    def _drop_the_unwanted(self, events: list[Event]) -> None:
        now = time.monotonic()
        with self._changed:
            late = {ticket for ticket in (*self._active, *self._waiting) if ticket.deadline <= now}
            late = {ticket for ticket in late if not ticket.is_cancelled}
            gone = {ticket for ticket in self._active if ticket.is_cancelled or ticket in late}
            self._active -= gone
            self._waiting = deque(ticket for ticket in self._waiting if ticket not in late)
        for ticket in gone:
            self.batch.drop(ticket)
        events += [(ticket, "late") for ticket in late]

    def _admit(self, events: list[Event]) -> None:
        """Read the prompts of those who come next, while there are slots; not too many at once."""
        num_read = 0
        while len(self.batch) < self.batch.num_slots:
            with self._changed:
                if not self._waiting:
                    return
                length = len(self._waiting[0].request.prompt)
                if num_read and num_read + length > _PROMPT_TOKENS:
                    return
                ticket = self._waiting.popleft()
                self._active.add(ticket)
            num_read += length
            ticket.started = time.monotonic()
            try:
                self._took(ticket, self.batch.add(ticket, ticket.request), events)
            except Exception as error:
                self.last_error = error
                self._leave(ticket)
                events.append((ticket, "failed"))

    def _step(self, events: list[Event]) -> None:
        try:
            steps = self.batch.step()
        except Exception as error:
            self.last_error = error
            self.batch.clear()
            with self._changed:
                failed = list(self._active)
                self._active.clear()
            events += [(ticket, "failed") for ticket in failed]
            return
        for ticket, step in steps:
            assert isinstance(ticket, Ticket)
            self._took(ticket, step, events)

    def _took(self, ticket: Ticket, step: Step, events: list[Event]) -> None:
        events.append((ticket, step))
        if step.end:
            self._seconds += 0.1 * (time.monotonic() - ticket.started - self._seconds)
            self._leave(ticket)

    def _leave(self, ticket: Ticket) -> None:
        with self._changed:
            self._active.discard(ticket)
