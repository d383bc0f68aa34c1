"""The queue in front of the batch: bounded, fair, and nobody holds a slot for longer than somebody waits for it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.tiny_models import random_network
from tests.waiting import HANGS, Clock

from lorafit.infer.continuous_batch import ContinuousBatch, GeneratedToken, Request, generate_tokens
from lorafit.infer.scheduler import QueueFullError, Scheduler, StoppedError, Ticket, TicketEvent

NETWORK = random_network(max_position_embeddings=4096)


class Desk:
    """A scheduler and what it said about each ticket."""

    def __init__(self, num_slots: int = 2, max_waiting: int = 3) -> None:
        self.events: dict[Ticket, list[GeneratedToken | str]] = {}
        self.order: list[Ticket] = []
        self.changed = threading.Condition()
        self.batch = ContinuousBatch[Ticket](NETWORK, num_slots)
        self.scheduler = Scheduler(self.batch, max_waiting, self.note)

    def note(self, events: list[TicketEvent]) -> None:
        with self.changed:
            for ticket, event in events:
                if ticket not in self.events:
                    self.order.append(ticket)
                self.events.setdefault(ticket, []).append(event)
            self.changed.notify_all()

    def ask(self, *firsts: int, tokens: int = 5, deadline: float = math.inf) -> list[Ticket]:
        tickets = [Ticket(Request([first, 9], frozenset(), tokens), deadline) for first in firsts]
        self.scheduler.submit(tickets)
        return tickets

    def wait(self, what: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(what, HANGS)

    def ended(self, ticket: Ticket) -> bool:
        last = self.events.get(ticket, [""])[-1]
        return last.end != "" if isinstance(last, GeneratedToken) else last != ""

    def wait_for(self, *tickets: Ticket) -> None:
        self.wait(lambda: all(map(self.ended, tickets)))


@pytest.fixture
def desk() -> Iterator[Callable[..., Desk]]:
    made: list[Desk] = []

    def make(*args: Any, start: bool = True, **settings: Any) -> Desk:
        made.append(Desk(*args, **settings))
        if start:
            made[-1].scheduler.start()
        return made[-1]

    yield make
    for one in made:
        one.scheduler.stop()


ENDLESS = 4000


def test_everybody_is_answered_as_alone_and_in_turn(desk: Callable[..., Desk]) -> None:
    one = desk(num_slots=2, max_waiting=10)
    tickets = one.ask(*range(1, 11))
    one.wait_for(*tickets)
    assert one.order == tickets
    for ticket in tickets:
        said = generate_tokens(NETWORK, [ticket.request])
        steps = [event for event in one.events[ticket] if isinstance(event, GeneratedToken)]
        assert [(step.id, step.end) for step in steps] == [(token.id, token.end) for _, token in said]
    assert one.scheduler.load() == (0, 0)


def test_no_more_than_the_queue_holds_may_wait(desk: Callable[..., Desk]) -> None:
    one = desk(num_slots=2, max_waiting=3, start=False)
    one.ask(1, 2, 3, 4)
    with pytest.raises(QueueFullError) as full:
        one.ask(5, 6)  # all or none
    assert 1 <= full.value.retry_after <= 60
    last = one.ask(5)
    assert one.scheduler.load() == (0, 5)
    with pytest.raises(QueueFullError):
        one.ask(6)
    one.scheduler.cancel(last)
    one.ask(7)
    one.scheduler.start()


def test_who_gives_up_frees_the_slot_at_once(desk: Callable[..., Desk]) -> None:
    one = desk(num_slots=1, max_waiting=3)
    (endless,) = one.ask(1, tokens=ENDLESS)
    one.wait(lambda: len(one.events.get(endless, [])) > 3)
    waiting = one.ask(2, 3)
    assert one.scheduler.load() == (1, 2)
    one.scheduler.cancel([waiting[0]])
    assert one.scheduler.load() == (1, 1)
    one.scheduler.cancel([endless])
    one.wait_for(waiting[1])
    assert len(one.events[endless]) < ENDLESS
    assert waiting[0] not in one.events
    assert len(one.batch) == 0


def test_time_runs_out_in_the_queue_and_while_answering(
    desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look at the clock, of which there is one a pass, is a second later."""
    clock = Clock(tick=1.0)
    monkeypatch.setattr("lorafit.infer.scheduler.time", clock)
    one = desk(num_slots=1, max_waiting=3, start=False)
    (endless,) = one.ask(1, tokens=ENDLESS, deadline=clock.now + 30)
    (hasty,) = one.ask(2, deadline=clock.now + 9)
    (patient,) = one.ask(3)
    one.scheduler.start()
    one.wait_for(endless, hasty, patient)
    assert one.events[hasty] == ["late"]
    assert one.events[endless][-1] == "late"
    assert len(one.events[endless]) > 20
    assert len(one.events[patient]) == 5


def test_a_pass_that_fails_is_told_and_the_next_works(
    desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = desk(num_slots=2, max_waiting=4)
    endless = one.ask(1, 2, tokens=ENDLESS)
    one.wait(lambda: all(len(one.events.get(ticket, [])) > 2 for ticket in endless))

    def broken() -> list[Any]:
        monkeypatch.undo()
        raise RuntimeError("a pass failed")

    monkeypatch.setattr(one.batch, "step", broken)
    one.wait_for(*endless)
    assert [one.events[ticket][-1] for ticket in endless] == ["failed", "failed"]
    assert str(one.scheduler.last_error) == "a pass failed"
    (after,) = one.ask(3)
    one.wait_for(after)
    assert len(one.events[after]) == 5


def test_a_prompt_that_fails_is_the_only_one(
    desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = desk(num_slots=3, max_waiting=4, start=False)
    add = ContinuousBatch.add

    def picky(batch: ContinuousBatch[Ticket], requests: Any) -> Any:
        if requests[0][1].prompt[0] == 13:
            raise MemoryError
        return add(batch, requests)

    monkeypatch.setattr(ContinuousBatch, "add", picky)
    tickets = one.ask(1, 13, 2)
    one.scheduler.start()
    one.wait_for(*tickets)
    assert one.events[tickets[1]] == ["failed"]
    assert [len(one.events[ticket]) for ticket in (tickets[0], tickets[2])] == [5, 5]


def test_stopping_fails_what_is_left_and_takes_nothing_more(desk: Callable[..., Desk]) -> None:
    one = desk(num_slots=1, max_waiting=3)
    (endless,) = one.ask(1, tokens=ENDLESS)
    one.wait(lambda: endless in one.events)
    (waiting,) = one.ask(2)
    one.scheduler.stop()
    assert one.events[endless][-1] == "stopped"
    assert one.events[waiting] == ["stopped"]
    with pytest.raises(StoppedError):
        one.ask(3)


def test_long_prompts_do_not_hold_up_those_who_are_answered(
    desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two passes at most one of these prompts is read."""
    one = desk(num_slots=4, max_waiting=4, start=False)
    seen: list[str] = []
    add, step = one.batch.add, one.batch.step
    monkeypatch.setattr(one.batch, "add", lambda *args: (seen.append("add"), add(*args))[1])
    monkeypatch.setattr(one.batch, "step", lambda: (seen.append("step"), step())[1])
    tickets = [Ticket(Request([number] * 400, frozenset(), 6), math.inf) for number in range(4)]
    one.scheduler.submit(tickets)
    one.scheduler.start()
    one.wait_for(*tickets)
    assert seen[:8] == ["add", "step"] * 4
