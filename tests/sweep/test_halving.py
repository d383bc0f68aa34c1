"""A search: what a longer run computes is what a winner ends with, the search goes on, and its recipe trains."""

from __future__ import annotations

import json
import math
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
from lorafit.sweep.halving import cost, hold, lengths, points_around, promoted, survivors
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


@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", "c"]), st.one_of(st.floats(1, 9), st.just(math.inf))), min_size=1
    ),
    st.data(),
)
def test_the_best_of_each_kind_of_targets_goes_on(runs: list[tuple[str, float]], data: st.DataObject) -> None:
    losses = {str(number): loss for number, (_, loss) in enumerate(runs)}
    points = {str(number): {"lora.targets": targets} for number, (targets, _) in enumerate(runs)}
    count = data.draw(st.integers(1, len(runs)))
    chosen = promoted(losses, points, count)
    assert len(chosen) == count
    assert [losses[name] for name in chosen] == sorted(losses[name] for name in chosen)
    assert losses[chosen[0]] == min(losses.values())
    kinds = {targets for targets, loss in runs if loss < math.inf}
    if count >= len(kinds):
        assert kinds <= {points[name]["lora.targets"] for name in chosen}
    for name in chosen:  # none stays behind a worse one of its kind
        for other, loss in losses.items():
            assert other in chosen or points[other] != points[name] or loss >= losses[name]


def test_the_usual_points_take_a_fifth_of_their_grid() -> None:
    points = points_around(1e-3)
    assert len(points) == 18
    assert cost(18, 640) < 640 * 18 / 5
    assert {point["lora.alpha"] for point in points} == {"16", "32", "128"}
    assert lengths(18, 640) == [10, 40, 160, 640]


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
    assert [[score["steps"] for score in trial["scores"]] for trial in found[:3]] == [[8, 32], [8, 32], [8]]
    assert invoke(*words) == found
    best = found[0]
    rate = best["varies"]["train.learning_rate"]
    losses = [trial["scores"][0]["loss"] for trial in found]
    assert best["scores"][0]["loss"] in sorted(losses)[:2]
    # what went on from the checkpoint before the fall is a run of that length
    rung = ["train.max_steps=32", "train.warmup=1", "train.schedule=wsd", "train.keep_best=false"]
    alone = start_run(
        load_config(None, [*tiny, *rung, f"train.learning_rate={rate}", f"run.output={tmp_path / 'alone'}"]),
        quiet=True,
    )
    weights = "adapter_model.safetensors"
    assert sha256_file(Path(best["run"]) / "adapter" / weights) == sha256_file(alone.adapter / weights)
    recipe = tmp_path / "t" / "recipe.yaml"
    text = recipe.read_text()
    assert f"held-out loss {best['scores'][-1]['loss']:.4f} after 32 steps" in text
    config = load_config(recipe)
    assert config.train.learning_rate == float(rate)
    assert (config.train.schedule, config.train.max_steps, config.run.output) == ("auto", 32, None)
    assert (tmp_path / "t" / "sweep.svg").exists()


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
