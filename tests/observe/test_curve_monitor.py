"""Each kind of problem in the curves is reported once, and healthy curves give no false alarm."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable

import pytest

from lorafit.observe.curve_monitor import LEAST, QUIET, CurveMonitor, diagnosing
from lorafit.observe.events import Diagnosis, Event, Heldout, Message, Refit, Step

NUM_STEPS = 600
Curve = Callable[[int], float]


def step(number: int, loss: float, norm: float = 1.0, rate: float = 2e-4) -> Step:
    return Step(number, NUM_STEPS, number / 200, loss, rate, norm, 500, 2000, 16, 1e4, 0.2, 10**9)


def curves(
    loss: Curve,
    norm: Curve = lambda _: 1.0,
    heldout: Curve | None = None,
    rate: Curve = lambda n: 1e-4 * (1 + math.cos(math.pi * n / NUM_STEPS)),
    noise: float = 0.1,
    base: float = 2.2,
    seed: int = 0,
) -> Iterable[Event]:
    """A run: `noise` is the standard deviation of a step's loss, as a share of it."""
    generator = random.Random(seed)
    for number in range(1, NUM_STEPS + 1):
        yield step(number, loss(number) * math.exp(generator.gauss(0, noise)), norm(number), rate(number))
        if heldout is not None and number % 50 == 0:
            yield Heldout(number, heldout(number), base, False)


def falling(number: int) -> float:
    return 1.0 + 1.2 * math.exp(-number / 60)


def diagnose(events: Iterable[Event]) -> list[Diagnosis]:
    monitor = CurveMonitor()
    return [diagnosis for event in events for diagnosis in monitor.look(event.as_dict())]


def whats(events: Iterable[Event]) -> list[str]:
    return [found.what for found in diagnose(events)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.02, 0.1, 0.3, 0.7])
def test_a_healthy_run_is_left_in_peace(seed: int, noise: float) -> None:
    assert whats(curves(falling, heldout=lambda n: falling(n) + 0.05, noise=noise, seed=seed)) == []


@pytest.mark.parametrize(
    "loss",
    [
        lambda n: 1.2 - 0.3 * n / NUM_STEPS,  # a model that knows the task: slow and small
        lambda n: 3.0 * math.exp(-n / 40) + 0.01,  # nearly nothing is left
        lambda n: falling(n) * (0.8 if n > 200 else 1.0),  # the second epoch is a step down
        lambda n: 0.05,  # nothing to learn
    ],
    ids=["slow", "to nothing", "epochs", "known"],
)
def test_other_healthy_curves_are_left_in_peace(loss: Curve) -> None:
    assert whats(curves(loss)) == []


def test_a_spike_is_said_with_its_step_and_once() -> None:
    found = diagnose(curves(lambda n: falling(n) * (4 if n in (300, 303, 320) else 1)))
    assert [(one.what, one.step) for one in found] == [("spike", 300)]
    assert "the loss jumped to" in found[0].text
    assert "train.learning_rate=7e-05" in found[0].hint
    far = diagnose(curves(lambda n: falling(n) * (4 if n in (100, 100 + QUIET + 50) else 1)))
    assert [one.step for one in far] == [100, 100 + QUIET + 50]


def test_a_second_phase_begins_again_and_is_left_in_peace() -> None:
    def both_phases() -> Iterable[Event]:
        yield from curves(falling)
        yield Refit(NUM_STEPS, 2 * NUM_STEPS, 60, NUM_STEPS, 0.7)
        yield from curves(falling)

    assert whats(both_phases()) == []
    assert whats(event for event in both_phases() if not isinstance(event, Refit)) != []


def test_a_spike_in_the_first_steps_is_no_spike() -> None:
    assert whats(curves(lambda n: 8.0 if n == LEAST - 5 else falling(n))) == []


def test_a_loss_that_climbs_is_a_rate_too_high() -> None:
    found = diagnose(curves(lambda n: falling(n) if n < 200 else falling(200) + (n - 200) / 50))
    assert "divergence" in {one.what for one in found}
    (climb,) = [one for one in found if one.what == "divergence"]
    assert "the learning rate is too high" in climb.hint
    assert 200 < climb.step < 300


def test_a_loss_that_grows_from_the_start_diverges() -> None:
    found = diagnose(curves(lambda n: 2.0 + n / 40))
    assert [one.what for one in found][:1] == ["divergence"]
    assert "diverges" in found[0].text


def test_a_loss_that_does_not_move_is_a_plateau() -> None:
    found = diagnose(curves(lambda n: 2.2, noise=0.03))
    assert {one.what for one in found} == {"plateau"}
    assert "has hardly moved" in found[0].text
    assert "too low" in found[0].hint


def test_a_held_out_loss_that_stands_still_is_a_plateau() -> None:
    found = diagnose(curves(falling, heldout=lambda n: 1.3 + 0.5 * math.exp(-n / 10)))
    assert [one.what for one in found] == ["plateau"]
    assert "has stayed at" in found[0].text
    assert "train.patience" in found[0].hint


def test_overfitting_differs_from_getting_worse() -> None:
    by_heart = diagnose(curves(lambda n: 2 * math.exp(-n / 150), heldout=lambda n: 1.2 + abs(n - 200) / 1000))
    assert [one.what for one in by_heart] == ["overfit"]
    assert "the run overfits" in by_heart[0].text
    assert "at step 200" in by_heart[0].text
    both_rise = diagnose(
        curves(lambda n: 1.0 + n / 400, heldout=lambda n: 1.2 + abs(n - 100) / 1000, base=9.0)
    )
    assert "overfit" not in {one.what for one in both_rise}


def test_worse_than_the_base() -> None:
    found = diagnose(curves(falling, heldout=lambda n: 2.5, base=2.2))
    assert [one.what for one in found] == ["worse than base"]
    assert "above that of the untrained model (2.2)" in found[0].text


def test_a_norm_that_explodes_for_some_steps() -> None:
    found = diagnose(curves(falling, norm=lambda n: 300.0 if 300 <= n < 310 else 1.0))
    assert [(one.what, one.step) for one in found] == [("gradient explosion", 302)]
    assert (
        whats(curves(falling, norm=lambda n: 300.0 if n == 300 else 1.0)) == []
    )  # clipping takes care of one


def test_what_was_said_before_a_resume_is_not_said_again() -> None:
    events = list(curves(lambda n: falling(n) * (4 if n in (300, 320) else 1)))
    lines = [event.as_dict() for event in events[:310]]
    watch = CurveMonitor.over([*lines, {"event": "step", "loss": None}, {"event": "note", "text": "x"}])
    assert [found for event in events[310:] for found in watch.look(event.as_dict())] == []


def test_observers_are_told_after_the_event_itself() -> None:
    seen: list[Event] = []
    observe = diagnosing(seen.append, CurveMonitor())
    events = [*curves(lambda n: falling(n) * (4 if n == 300 else 1)), Message("end")]
    for event in events:
        observe(event)
    (at,) = [place for place, event in enumerate(seen) if isinstance(event, Diagnosis)]
    before = seen[at - 1]
    assert isinstance(before, Step)
    assert before.step == 300
    assert [event for event in seen if not isinstance(event, Diagnosis)] == events
