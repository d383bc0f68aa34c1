"""Which held-out measurement is the best one, and how many came after it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lorafit.training.checkpoint import TrainState, state_of

LOSSES = st.lists(st.floats(0, 100), min_size=1, max_size=12)


def measured(losses: list[float], tolerance: float) -> TrainState:
    state = TrainState()
    for step, loss in enumerate(losses, 1):
        state.step = step
        assert state.measured(loss, tolerance) == (state.best_step == step)
    return state


@given(LOSSES)
def test_without_tolerance_the_first_lowest_loss_is_the_best(losses: list[float]) -> None:
    state = measured(losses, 0.0)
    assert (state.best_loss, state.best_step) == (min(losses), losses.index(min(losses)) + 1)
    assert state.num_worse == len(losses) - losses.index(min(losses)) - 1


@given(LOSSES, st.floats(0, 10))
def test_with_tolerance_it_is_the_last_one_near_the_lowest_before_it(
    losses: list[float], tolerance: float
) -> None:
    state = measured(losses, tolerance)
    near = [
        step
        for step, loss in enumerate(losses, 1)
        if step == 1 or loss < min(losses[: step - 1]) * (1 + tolerance)
    ]
    assert (state.best_step, state.num_worse) == (near[-1], len(losses) - near[-1])
    assert (state.best_loss, state.lowest_loss) == (losses[near[-1] - 1], min(losses))


def test_a_state_of_an_earlier_version_goes_on_from_its_best_loss() -> None:
    state = state_of({"step": 3, "best_loss": 1.0, "best_step": 2, "num_worse": 1})
    assert state.lowest_loss is None
    assert not state.measured(1.0, 0.0)
    assert state.measured(0.9, 0.0)
