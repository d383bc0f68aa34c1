"""A time budget: the run ends within 5 % of it, with warm-up, a held rate and a fall to zero, on any clock."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.runs import digest, events, interrupt_after, tiny_run

from lorafit.config.fields import budget_seconds, next_clock_time
from lorafit.config.load import load_config
from lorafit.config.schema import TrainSection
from lorafit.distributed.ranks import Ranks
from lorafit.errors import LorafitError, RunError
from lorafit.observe.run_summary import summarize
from lorafit.plan.cadence import Cadence
from lorafit.run_dir import RunDirectory
from lorafit.training import loop, pace
from lorafit.training.checkpoint import read_state
from lorafit.training.checkpoint_writer import AsyncCheckpointWriter
from lorafit.training.pace import Budget, TimedPace
from lorafit.training.run import resume_run

TRAIN = TrainSection(learning_rate=0.5, schedule="wsd", warmup=0.03, eval_every=7, save_every=11)
NOW = datetime(2026, 11, 30, 14, 30).timestamp()


@dataclass
class Clock:
    """Time that only work takes; `at` is since 1970."""

    at: float = NOW
    patch: pytest.MonkeyPatch = field(default_factory=pytest.MonkeyPatch)

    def __enter__(self) -> Clock:
        self.patch.setattr(pace, "clock", lambda: self.at)
        self.patch.setattr(pace, "wall_clock", lambda: self.at)
        return self

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


@dataclass
class Simulated:
    """A run of a machine whose step takes about `step_seconds`, with noise, measurements, saves and pauses."""

    clock: Clock
    noise: random.Random
    step_seconds: float
    rates: list[float] = field(default_factory=list)
    measured: list[int] = field(default_factory=list)

    def work(self, seconds: float, spread: float = 0.3) -> None:
        self.clock.at += seconds * self.noise.lognormvariate(0, spread)

    def run(self, budget: Budget, pauses: dict[int, float], measuring: float, saving: float) -> float:
        """Train to the end; returns the seconds of work, without pauses and with the end."""
        began, paused, step = self.clock.at, 0.0, 0
        self.work(budget.used, 0)
        budget.measuring = measuring
        timed, cadence = TimedPace(TRAIN, budget, step, Ranks()), Cadence(7, 11, None, 0, 5)
        while step < timed.num_steps:
            self.rates.append(timed.rate(step))
            self.work(self.step_seconds)
            step += 1
            due = timed.count(step, cadence.at(step), saving)
            if due.measure:
                self.measured.append(step)
                self.work(measuring, 0.1)
            if due.save:
                timed.pause()
                self.work(saving, 0.1)
            if step in pauses and step < timed.num_steps:
                timed.pause()
                self.clock.at += pauses[step]
                paused += pauses[step]
                timed = TimedPace(TRAIN, budget, step, Ranks())
        assert self.measured[-1] == step == budget.last
        self.work(budget.ending, 0.1)
        return self.clock.at - began - (paused if budget.until is None else 0.0)


@given(
    st.integers(0, 10**6),
    st.floats(0.004, 0.015),
    st.floats(0, 0.05),
    st.floats(0, 0.1),
    st.dictionaries(st.integers(1, 40), st.floats(1, 1e5), max_size=3),
)
def test_a_run_ends_within_five_percent_of_its_budget(
    seed: int, step_share: float, measure_share: float, end_share: float, pauses: dict[int, float]
) -> None:
    total = 1200.0
    with Clock() as clock:
        budget = Budget.of("20min")
        budget.used, budget.ending, budget.saving = 0.03 * total, end_share * total, 0.5
        machine = Simulated(clock, random.Random(seed), step_share * total)
        worked = machine.run(budget, pauses, measure_share * total, 0.5)
    assert abs(worked - total) <= 0.05 * total
    rates = machine.rates
    assert 0 < min(rates) <= max(rates) <= 0.5
    assert rates[-1] <= max(0.05, 8 / len(rates))
    if len(rates) > 60 and not pauses:
        middle = rates[len(rates) // 5 : len(rates) * 7 // 10]
        assert set(middle) == {0.5}
        falling = rates[len(rates) * 17 // 20 :]
        assert all(later <= earlier * 1.001 for earlier, later in itertools.pairwise(falling))


@pytest.mark.parametrize("pause", [0.0, 300.0, 850.0])
def test_a_clock_time_passes_in_pauses_too(pause: float) -> None:
    with Clock() as clock:
        budget = Budget.of("14:50")
        assert budget.until == NOW + 1200
        budget.ending = 20.0
        machine = Simulated(clock, random.Random(1), 4.0)
        machine.run(budget, {30: pause} if pause else {}, 5.0, 0.5)
        assert abs(clock.at - budget.until) <= 0.05 * 1200
    assert machine.rates[-1] < 0.08


def test_a_clock_time_that_has_passed_leaves_one_step() -> None:
    with Clock() as clock:
        budget = Budget.of("14:31")
        clock.at += 7200
        timed = TimedPace(TRAIN, budget, 40, Ranks())
        assert timed.num_steps == 41
        assert 0 < timed.rate(40) < 0.1
        clock.at += 1
        due = timed.count(41, Cadence(100, 100, None, 0, 5).at(41), 0.0)
        assert (timed.num_steps, due.measure, due.save) == (41, True, True)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("20min", 1200), ("1h30m", 5400), ("1h 30min", 5400), ("90s", 90), (90, 90), (1.5, 1.5), ("2d", 172800)],
)
def test_durations(text: Any, seconds: float) -> None:
    stored = TrainSection(budget=text).budget
    assert stored is not None
    assert budget_seconds(stored) == seconds
    assert TrainSection(budget=stored).budget == stored


@pytest.mark.parametrize(
    "text", ["", "soon", "20 apples", "0s", "-5min", "24:00", "18:60", "1e9d", "5m x", "99999d"]
)
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(LorafitError, match="time budget"):
        load_config(None, ["model.name=m", "data.path=d", f"train.budget={text or '`'}"])


def test_a_clock_time_is_a_text_in_a_recipe_and_on_the_command_line(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {name: m}\ndata: {path: d}\ntrain: {budget: 18:00}\n")
    assert load_config(recipe).train.budget == "18:00"
    assert load_config(recipe, ["train.budget=9:05"]).train.budget == "9:05"
    now = datetime(2026, 11, 30, 18, 0, 1)
    assert next_clock_time("18:00", now) - now == timedelta(days=1, seconds=-1)


@pytest.mark.parametrize("other", ["train.max_steps=3", "train.refit=true"])
def test_two_lengths_are_refused(other: str) -> None:
    with pytest.raises(LorafitError, match=r"train\.budget"):
        load_config(None, ["model.name=m", "data.path=d", "train.budget=20min", other])


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """A clock that moves one second per step and two per held-out measurement; reading took three."""
    gradients, measure, save = loop._gradients, loop.heldout_loss, AsyncCheckpointWriter.save
    with Clock() as clock:

        def one_second(*given: Any) -> Any:
            clock.at += 1.0
            return gradients(*given)

        def two_seconds(*given: Any) -> float:
            clock.at += 2.0
            return measure(*given)

        def at_once(writer: AsyncCheckpointWriter, *given: Any) -> None:
            save(writer, *given)
            writer.wait(block=True)  # else the steps beside it decide what a save takes by this clock

        monkeypatch.setattr(loop, "_gradients", one_second)
        monkeypatch.setattr(AsyncCheckpointWriter, "save", at_once)
        monkeypatch.setattr(loop, "heldout_loss", two_seconds)
        monkeypatch.setattr("lorafit.plan.planner.RunInputs.elapsed", lambda _: 3.0)
        monkeypatch.setattr(pace, "save_seconds", lambda _: 0.0)
        monkeypatch.setattr(pace, "ENDS_SECONDS", 0.0)
        monkeypatch.setattr("lorafit.plan.planner.tokens_asked", lambda _: 0.0)  # whose time is measured
        yield clock


@pytest.mark.slow
def test_a_run_trains_as_many_steps_as_fit_and_records_their_rates(
    tiny: list[str], clocked: Clock, tmp_path: Path
) -> None:
    # 3 s reading, 2 s for the base, 12 steps, after the 10th a measurement, 2 s for the last one
    result = tiny_run([*tiny, "train.eval_every=10"], tmp_path / "run", "train.budget=21s")
    assert (result.finished, result.step) == (True, 12)
    assert [event["step"] for event in events(result, "heldout")] == [10, 12]
    rates = [event["learning_rate"] for event in events(result, "step")]
    assert rates[0] < max(rates) == 0.01 > rates[-1] > 0
    config = RunDirectory(result.path).config().train
    assert (config.budget, config.schedule, config.patience, config.refit) == ("21s", "wsd", 0, False)
    assert any("time budget 21s" in event["text"] for event in events(result, "note"))
    summary = summarize(RunDirectory(result.path))
    assert (summary.state, summary.num_steps) == ("finished", None)
    again = resume_run(result.path, quiet=True)
    assert (again.finished, again.step) == (True, 12)


@pytest.mark.slow
def test_a_resumed_run_goes_on_from_the_time_that_its_checkpoint_holds(
    tiny: list[str], clocked: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny_run(tiny, tmp_path / "whole", "train.budget=20s")
    with monkeypatch.context() as patch:
        interrupt_after(6, patch)
        cut = tiny_run(tiny, tmp_path / "cut", "train.budget=20s")
    state = read_state(RunDirectory(cut.path).checkpoint(6))
    assert state.budget is not None
    assert (state.budget.used, state.budget.last) == (11.0, None)
    clocked.at += 5000
    resumed = resume_run(cut.path, quiet=True)
    assert (resumed.finished, resumed.step) == (True, whole.step)
    # with the same times the same rates, and so the same bytes
    rates = [[event["learning_rate"] for event in events(run, "step")] for run in (whole, resumed)]
    assert rates[0] == rates[1]
    assert digest(resumed) == digest(whole)


def test_a_budget_that_leaves_no_time_for_a_step_ends_before_it(
    tiny: list[str], clocked: Clock, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="no time is left for a step: loading took 3s"):
        tiny_run(tiny, tmp_path / "run", "train.budget=3s")


@pytest.mark.slow
def test_another_budget_in_a_resume_needs_consent_and_keeps_what_was_used(
    tiny: list[str], clocked: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(6, patch)
        cut = tiny_run(tiny, tmp_path / "cut", "train.budget=20s")
    with pytest.raises(RunError, match=r"train\.budget changed: was 20s, is 30s"):
        resume_run(cut.path, ["train.budget=30s"], quiet=True)
    longer = resume_run(cut.path, ["train.budget=30s"], accept_changes=True, quiet=True)
    assert longer.finished
    assert longer.step == 23  # 3 s reading, 2 s for the base, 2 s for the last measurement
