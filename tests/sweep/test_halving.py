"""A search: what a longer run computes is what a winner ends with, the search goes on, and its recipe trains."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from lorafit.cli.main import app
from lorafit.config.load import load_config
from lorafit.errors import LorafitError
from lorafit.storage.atomic import sha256_file
from lorafit.sweep import halving
from lorafit.sweep.halving import (
    Score,
    Usual,
    cost,
    hold,
    lengths,
    of_recipe,
    points_around,
    survivors,
    tune,
)
from lorafit.sweep.trials import Trial
from lorafit.training.run import Result, start_run


@given(st.integers(1, 300), st.integers(8, 100_000))
def test_a_search_is_short(num_points: int, steps: int) -> None:
    found = lengths(num_points, steps)
    assert found[-1] == steps
    assert found == sorted(set(found))
    assert all(length >= min(8, steps) for length in found)
    assert survivors(num_points, 0) == num_points
    if num_points >= 16 and steps >= 8 * 4**3:
        assert cost(num_points, steps) <= 0.25 * num_points * steps
    doublings = num_points.bit_length() - 1
    if steps >= 8 * 2**doublings:  # a rung after the first trains 0.6 of its steps anew, in half as many runs
        most = num_points * steps / 2**doublings * (1 + 0.6 * doublings)
        assert cost(num_points, steps) <= most + 2 * num_points  # hold() rounds down


def test_the_usual_points_take_a_fifth_of_their_grid() -> None:
    points = points_around(1e-3)
    assert len(points) == 18
    assert cost(18, 640) <= 640 * 18 / 5
    assert {point["lora.alpha"] for point in points} == {"16", "32", "128"}
    assert lengths(18, 640) == [40, 80, 160, 320, 640]
    assert [survivors(18, rung) for rung in range(5)] == [18, 9, 4, 2, 1]


def invoke(*words: str, code: int = 0) -> list[dict[str, Any]]:
    done = CliRunner().invoke(app, ["tune", *words, "--quiet", "--json"])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_a_search_picks_goes_on_and_writes_a_recipe(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*tiny, "train.max_steps=32", "--vary", "train.learning_rate=1e-5,1e-4,1e-3,1e-2,3e-2"]
    words += ["--output", str(tmp_path / "t")]
    start, begun = halving.start_run, []

    def killed(config: Any, **more: Any) -> Result:
        begun.append(config.run.output)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return start(config, **more)

    with monkeypatch.context() as patch:
        patch.setattr(halving, "start_run", killed)
        invoke(*words, code=130)
        found = invoke(*words)
    assert len(begun) == 6  # the third one twice
    lengths_of = [[score["steps"] for score in trial["scores"]] for trial in found]
    assert sorted(lengths_of) == [[8], [8], [8], [8, 16], [8, 16, 32]]
    lowest = [min(score["loss"] for score in trial["scores"]) for trial in found]
    assert lowest == sorted(lowest)
    assert invoke(*words) == found
    best = found[0]
    assert lengths_of[0] == [8, 16, 32]
    assert best["scores"][-1]["loss"] == lowest[0]
    recipe = tmp_path / "t" / "recipe.yaml"
    text = recipe.read_text()
    assert f"held-out loss {lowest[0]:.4f} after 32 steps" in text
    assert "# It trains for 32 steps." in text
    config = load_config(recipe)
    assert config.train.learning_rate == float(best["varies"]["train.learning_rate"])
    assert (config.train.schedule, config.train.max_steps, config.run.output) == ("wsd", 32, None)
    assert (tmp_path / "t" / "sweep.svg").exists()
    # what went on from the checkpoints before the falls is the run of the recipe
    again = start_run(
        load_config(recipe, ["train.keep_best=false", f"run.output={tmp_path / 'a'}"]), quiet=True
    )
    weights = "adapter_model.safetensors"
    assert sha256_file(Path(best["run"]) / "adapter" / weights) == sha256_file(again.adapter / weights)


def test_longer_runs_that_are_worse_end_the_search_and_the_recipe_has_the_best_length(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {8: [3.0, 2.0, math.inf, 5.0], 16: [2.5, 2.1]}
    begun: list[tuple[str, int]] = []

    def run(trial: Trial, steps: list[int], rung: int, *rest: object) -> Score:
        begun.append((trial.name, steps[rung]))
        return Score(trial.name, steps[rung], losses[steps[rung]][int(trial.name[-3:]) - 1], 1.0)

    monkeypatch.setattr(halving, "_run", run)
    said: list[str] = []
    words = [*tiny, "train.max_steps=32"]
    tuned = tune(tmp_path, ["lora.rank=2,4,6,8"], words, None, {}, None, said.append, True)
    assert [length for _, length in begun] == [8, 8, 8, 8, 16, 16]
    assert said[:2] == ["4 runs of 8 steps", "2 runs of 16 steps"]
    assert said[-1] == "no run of 16 steps is better than the best shorter one: longer ones are left out"
    assert [result.trial.name[-3:] for result in tuned.results] == ["002", "001", "004", "003"]
    assert tuned.recipe is not None
    config = load_config(tuned.recipe)
    assert (config.train.max_steps, config.train.schedule, config.lora.rank) == (8, "wsd", 4)
    assert tuned.about_recipe == "for 8 steps"
    losses[16] = [2.5, 1.9]
    losses[32] = [math.inf, 1.8]
    tune(tmp_path / "longer", ["lora.rank=2,4,6,8"], words, None, {}, None, said.append, True)
    assert said[-1] == "1 run of 32 steps"


def test_a_recipe_has_the_length_of_the_best_run_where_the_search_saw_it() -> None:
    steps, usual = [8, 16, 32], Usual(32, refit=False, facts=False)
    words, _ = of_recipe(steps, 32, usual)
    assert words == ["train.max_steps=32", "train.warmup=1.0", "train.schedule=wsd"]
    assert of_recipe(steps, 8, usual) == (["train.max_steps=8", *words[1:]], "for 8 steps")
    refitted = of_recipe(steps, 8, replace(usual, refit=True))
    assert refitted == (
        ["train.max_steps=8", *words[1:], "train.refit=true"],
        "for 8 steps, then on all rows",
    )
    # a search with a budget has not seen the usual length; facts are learnt after the lowest loss
    budget = replace(usual, steps=99)
    assert of_recipe(steps, 32, budget) == (
        [], "for the usual length of 99 steps, as the longest runs were the best")  # fmt: skip
    assert of_recipe(steps, 16, budget)[0][0] == "train.max_steps=16"
    assert of_recipe(steps, 16, replace(usual, facts=True))[0] == []


def test_a_search_without_held_out_rows_or_with_a_clock_time_is_refused(
    tiny: list[str], tmp_path: Path
) -> None:
    for budget in ("18:00", "soon", "0s", "0", "-5min", "366d"):
        with pytest.raises(LorafitError) as told:
            invoke(*tiny, "--budget", budget, "--output", str(tmp_path / "t"))
        (problem,) = told.value.problems
        assert (problem.place, problem.hint) == (
            f"--budget {budget}",
            "give a duration, for example --budget 20min",
        )


def test_the_hold_is_before_the_fall() -> None:
    assert [hold(length) for length in (8, 10, 40, 161)] == [6, 8, 32, 128]
