"""Events are plain values that JSON can hold, and reach every observer in order."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError

import pytest

from lorafit.observe.events import (
    Answers,
    Event,
    Heldout,
    Message,
    Proved,
    RunEnded,
    RunStarted,
    Saved,
    Step,
    fan_out,
)

EVENTS: list[Event] = [
    RunStarted("tiny", 52_002, 300, 1_100_048_384, 4_505_600, "cpu", "float32", "runs/a"),
    Step(1, 300, 0.01, 2.5, 2e-4, 0.7, 90, 120, 4, 312.0, 0.4, 10**9),
    Heldout(1, 2.1, None, True),
    Saved(1, "runs/a/checkpoints/step-000001", "interval"),
    Answers(1, ["question"], ["answer"], [True], ["base"], 0.5),
    Proved("warn", ["28 of 28 changed"], ["only 1 of 20 ended"], 2.5),
    Message("a note"),
    RunEnded(1, "interrupted", 3.0, "runs/a/adapter", 2.5),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.kind)
def test_every_field_survives_json(event: Event) -> None:
    fields = json.loads(json.dumps(event.as_dict()))
    assert fields.pop("event") == event.kind
    assert type(event)(**fields) == event


def test_events_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        EVENTS[1].step = 2  # type: ignore[misc, union-attr]


def test_fan_out_keeps_the_order() -> None:
    seen: list[tuple[str, Event]] = []
    observe = fan_out([lambda event: seen.append(("a", event)), lambda event: seen.append(("b", event))])
    for event in EVENTS[:2]:
        observe(event)
    assert seen == [("a", EVENTS[0]), ("b", EVENTS[0]), ("a", EVENTS[1]), ("b", EVENTS[1])]
