"""A bounded first-come, first-served queue in front of a batch, and the thread that processes it.

It knows no text and no HTTP. One function receives the events of a pass, on the scheduler's own thread.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from lorafit.infer.continuous_batch import ContinuousBatch, GeneratedToken, Request

# most that are read between two decode passes, except one longer prompt: active rows wait
_PROMPT_TOKENS = 512

Failure = Literal["late", "failed", "stopped"]


class QueueFullError(Exception):
    """The queue is full. `retry_after` is the time until the next try, in whole seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("the queue is full")
        self.retry_after = retry_after


class StoppedError(Exception):
    """The scheduler accepts no tickets any more."""


@dataclass(eq=False, slots=True)
class Ticket:
    """One request in the queue or in the batch. `deadline` is a time of time.monotonic."""

    request: Request
    deadline: float
    is_cancelled: bool = False
    started: float = 0.0


TicketEvent = tuple[Ticket, GeneratedToken | Failure]


class Scheduler:
    """Answers tickets with `batch`; at most `max_waiting` of them wait for a slot.

    `deliver` gets the events of a pass: a token of a ticket, or its failure: `late` after the deadline, `failed` when
    the pass failed, or `stopped`. A token with an `end`, a failure or `cancel` is the last event of a ticket.
    """

    def __init__(
        self, batch: ContinuousBatch[Ticket], max_waiting: int, deliver: Callable[[list[TicketEvent]], None]
    ) -> None:
        self.batch = batch
        self.capacity = batch.num_slots + max_waiting
        self.last_error: BaseException | None = None
        self._deliver = deliver
        self._waiting: deque[Ticket] = deque()
        self._active: set[Ticket] = set()
        self._seconds = 1.0  # of an answer, smoothed
        self._stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="lorafit-batch", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Queue all of `tickets` or none. Raises QueueFullError or StoppedError."""
        with self._changed:
            if self._stopping:
                raise StoppedError
            if len(self._active) + len(self._waiting) + len(tickets) > self.capacity:
                rounds = 1 + len(self._waiting) / self.batch.num_slots
                raise QueueFullError(max(1, min(60, round(rounds * self._seconds))))
            self._waiting.extend(tickets)
            self._changed.notify()

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Remove tickets: from the queue now, from the batch before the next pass."""
        with self._changed:
            for ticket in tickets:
                ticket.is_cancelled = True
            self._waiting = deque(ticket for ticket in self._waiting if not ticket.is_cancelled)
            self._changed.notify()

    def load(self) -> tuple[int, int]:
        """(tickets in the batch, tickets in the queue)."""
        with self._changed:
            return len(self._active), len(self._waiting)

    def stop(self) -> None:
        """Fail all tickets and end the thread. Returns after the current pass."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._active or self._stopping):
                    self._changed.wait()
                if self._stopping:
                    stopped = [*self._active, *self._waiting]
                    self._active.clear()
                    self._waiting.clear()
                    break
            events = [*self._expire(), *self._admit(), *self._step()]
            with self._changed:
                for ticket, event in events:
                    if isinstance(event, str):
                        self._active.discard(ticket)
                    elif event.end:
                        self._active.discard(ticket)
                        self._seconds += 0.1 * (time.monotonic() - ticket.started - self._seconds)
            if events := [event for event in events if not event[0].is_cancelled]:
                self._deliver(events)
        if stopped:
            self._deliver([(ticket, "stopped") for ticket in stopped])

    def _expire(self) -> list[TicketEvent]:
        """Remove the tickets whose deadline is over, and cancelled ones from the batch."""
        now = time.monotonic()
        with self._changed:
            tickets = [*self._active, *self._waiting]
            late = {ticket for ticket in tickets if ticket.deadline <= now and not ticket.is_cancelled}
            removed = {ticket for ticket in self._active if ticket.is_cancelled or ticket in late}
            self._active -= removed
            self._waiting = deque(ticket for ticket in self._waiting if ticket not in late)
        for ticket in removed:
            self.batch.drop(ticket)
        return [(ticket, "late") for ticket in late]

    def _admit(self) -> list[TicketEvent]:
        """Read the prompts of the next tickets while there are slots, at most _PROMPT_TOKENS."""
        events: list[TicketEvent] = []
        num_read = 0
        while len(self.batch) < self.batch.num_slots:
            with self._changed:
                if not self._waiting:
                    break
                length = len(self._waiting[0].request.prompt)
                if num_read and num_read + length > _PROMPT_TOKENS:
                    break
                ticket = self._waiting.popleft()
                self._active.add(ticket)
            num_read += length
            ticket.started = time.monotonic()
            try:
                events += self.batch.add([(ticket, ticket.request)])
            except Exception as error:  # this prompt's alone
                self.last_error = error
                events.append((ticket, "failed"))
        return events

    def _step(self) -> list[TicketEvent]:
        try:
            return list(self.batch.step())
        except Exception as error:
            self.last_error = error
            return [(ticket, "failed") for ticket in self.batch.clear()]
