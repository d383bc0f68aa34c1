"""Successive halving: short runs of many points, and runs of twice the length of the better half, by held-out loss.

This is the method of Jamieson and Talwalkar (2016). A run of a rung ends with the fall of the rate (schedule `wsd`), so
that runs of one length compare. A winner goes on from its checkpoint before the fall: it ends with the bytes of a run
that had the longer length from the beginning. The result is the lowest loss at any length, because few rows are
overfitted by long runs, and each run has its own best length.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorafit.config.auto import auto_learning_rate
from lorafit.config.load import config_from_args, dump_values, with_absolute_paths
from lorafit.config.schema import Config
from lorafit.errors import LorafitError, RunError
from lorafit.model.build import BaseModelCache
from lorafit.observe.metrics_file import read_metrics
from lorafit.observe.progress import progress
from lorafit.observe.units import count
from lorafit.plan.planner import RunInputs, plan_run
from lorafit.plan.predict import Plan
from lorafit.redact import one_line
from lorafit.storage.atomic import remove_folder, write_file
from lorafit.storage.locks import lock
from lorafit.storage.safe_read import MB, read_json
from lorafit.sweep.run import TrialResult
from lorafit.sweep.space import Point, grid, parse_axes
from lorafit.sweep.trials import GOES_ON, Trial, plan_sweep
from lorafit.training.optim import FALL
from lorafit.training.run import resume_run, start_run

SHARE = 2  # one of so many runs goes on, for so many times the steps
LEAST_STEPS = 8  # of the shortest runs
_FACTORS, _RANKS = (1 / 3, 1.0, 3.0), (8, 16, 64)
_TARGETS = ("all-linear", "[q_proj, v_proj]")
_RESULTS, RECIPE = "tune.json", "recipe.yaml"
# How the runs of a search differ from those of `lorafit train`: their end is not verified, and the last step counts.
_OWN = ("run.verify=false", "run.samples=0", "train.refit=false", "train.keep_best=false", "train.patience=0")


@dataclass(frozen=True, slots=True)
class Score:
    """A run of a trial at one length: its held-out loss, and the seconds of its steps (those of this rung)."""

    trial: str
    steps: int
    loss: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Usual:
    """How `lorafit train` trains the rows: steps, whether on all rows in the end, and whether they may be facts."""

    steps: int
    refit: bool
    facts: bool


@dataclass(frozen=True, slots=True)
class Tuned:
    """What a search came to: its trials, best first, their scores, and the best one's recipe (None: interrupted).

    `about_recipe` says what the recipe trains.
    """

    results: Sequence[TrialResult]
    scores: Sequence[Score]
    recipe: Path | None
    about_recipe: str = ""

    @property
    def seconds(self) -> float:
        """What all steps took."""
        return sum(score.seconds for score in self.scores)

    def of(self, result: TrialResult) -> list[Score]:
        """The scores of a trial, the shortest run first."""
        return [score for score in self.scores if score.trial == result.trial.name]


def points_around(rate: float) -> list[Point]:
    """The points that are tried by default, around a learning rate. alpha is twice the rank."""
    return [
        {
            "train.learning_rate": f"{rate * factor:.2g}",
            "lora.rank": str(rank),
            "lora.alpha": str(2 * rank),
            "lora.targets": targets,
        }
        for targets in _TARGETS
        for rank in _RANKS
        for factor in _FACTORS
    ]


def lengths(num_points: int, steps: int) -> list[int]:
    """The steps of the runs of each rung, ending with `steps`."""
    rungs = num_points.bit_length()
    found = [max(LEAST_STEPS, steps // SHARE**rung) for rung in reversed(range(rungs))]
    return sorted({min(steps, length) for length in found})


def survivors(num_points: int, rung: int) -> int:
    """How many runs are in a rung."""
    return max(1, num_points // int(SHARE**rung))


def cost(num_points: int, steps: int) -> float:
    """The steps that a search computes, at most."""
    before, total = 0.0, 0.0
    for rung, length in enumerate(lengths(num_points, steps)):
        total += survivors(num_points, rung) * (length - before)
        before = hold(length)
    return total


def hold(length: int) -> int:
    """The steps of a run before its rate falls, from where a longer one goes on."""
    return int(length * (1 - FALL))


def warmup(steps: Sequence[int]) -> int:
    """The steps of the warm-up, the same in runs of all lengths `steps`."""
    return max(1, min(round(0.03 * steps[-1]), steps[0] // 4))


def tune(
    folder: Path,
    vary: Sequence[str],
    settings: Sequence[str],
    recipe: str | None,
    flags: Mapping[str, object],
    budget: float | None,
    announce: Callable[[str], None],
    quiet: bool,
) -> Tuned:
    """Search in `folder`, or go on with the search there. `budget` is the seconds that it may take, None for the length
    of `lorafit train`. Raises a LorafitError.
    """

    def config_of(point: Point, own: Sequence[str] = (), last: Sequence[str] = ()) -> Config:
        words = [*own, *settings, *(f"{key}={value}" for key, value in point.items()), *last]
        return config_from_args(words, recipe, {key: flags[key] for key in flags if key not in point})

    stored = _stored(folder)
    if stored is None:
        plan = plan_run(config_of({}, _OWN), quiet=quiet)
        points = grid(parse_axes(vary)) if vary else points_around(auto_learning_rate(plan.parameters))
        trained = RunInputs.read(config_of({}), True).config.train
        stored = {
            "vary": list(vary),
            "points": points,
            "lengths": _lengths(plan, len(points), budget),
            "usual": {"steps": plan.steps, "refit": trained.refit, "facts": trained.tolerance > 0},
            "scores": [],
        }
    points, steps, usual = stored["points"], stored["lengths"], Usual(**stored["usual"])
    planned = [(point, _of_rung(config_of(point, _OWN), _rung(steps, 0))) for point in points]
    trials = {trial.name: trial for trial in plan_sweep(folder, planned)}
    with lock(folder / "tune.lock", "search"):
        _write(folder, stored)
        scores = [Score(**{**score, "loss": score["loss"] or math.inf}) for score in stored["scores"]]
        base, going = BaseModelCache(), list(trials)
        for rung, length in enumerate(steps):
            announce(f"{count(len(going), 'run')} of {count(length, 'step')}")
            for name in going:
                if any(score.trial == name and score.steps == length for score in scores):
                    continue
                score = _run(trials[name], steps, rung, base, quiet)
                if score is None:
                    return _tuned(trials, scores, None)
                scores.append(score)
                _write(folder, {**stored, "scores": [_as_dict(score) for score in scores]})
            losses = {score.trial: score.loss for score in scores if score.steps == length}
            if not any(map(math.isfinite, losses.values())):
                raise RunError(
                    "no run could be trained",
                    place=str(folder),
                    hint="the error of each is beside its folder",
                )
            earlier = [score.loss for score in scores if score.steps < length]
            if earlier and min(losses.values()) >= min(earlier) and length < steps[-1]:
                announce(
                    f"no run of {length} steps is better than the best shorter one: longer ones are left out"
                )
                break
            going = sorted(losses, key=losses.__getitem__)[: survivors(len(points), rung + 1)]
        best = min(scores, key=lambda score: score.loss)
        words, about = of_recipe(steps, best.steps, usual)
        trial = trials[best.trial]
        path = _write_recipe(folder, trial, best, config_of(trial.point, last=words), scores, about)
    return _tuned(trials, scores, path, about)


def of_recipe(steps: Sequence[int], length: int, usual: Usual) -> tuple[list[str], str]:
    """(settings of the recipe whose best run had `length` steps, what it trains)."""
    if usual.facts:
        why = "the answers are short, and facts are learnt after the lowest held-out loss"
        return [], f"for the usual length: {why}"
    if length == steps[-1] < usual.steps:
        return [], f"for the usual length of {usual.steps} steps, as the longest runs were the best"
    words = [f"train.max_steps={length}", f"train.warmup={float(warmup(steps))}", "train.schedule=wsd"]
    words += ["train.refit=true"] if usual.refit else []
    return words, f"for {length} steps" + (", then on all rows" if usual.refit else "")


def _lengths(plan: Plan, num_points: int, budget: float | None) -> list[int]:
    """The lengths of a search that takes about `budget` seconds, by the plan of one run."""
    steps = plan.steps
    if budget is not None and plan.times is not None:
        one = (plan.times.steps + plan.times.measuring / 2) / plan.steps
        while cost(num_points, steps) * one > budget and steps > LEAST_STEPS:
            steps = int(steps * 0.95)
    if cost(num_points, steps) > 0 and steps < LEAST_STEPS:
        raise RunError(
            f"a run of {steps} steps is too short to compare", hint="give more rows, or train.max_steps"
        )
    return lengths(num_points, steps)


def _rung(steps: Sequence[int], rung: int) -> dict[str, Any]:
    """The settings in `train` of the runs of a rung."""
    length = steps[rung]
    settings = {"max_steps": length, "save_every": hold(length), "eval_every": length, "keep": 2}
    return {**settings, "warmup": float(warmup(steps)), "schedule": "wsd"}


def _of_rung(config: Config, settings: Mapping[str, Any]) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update=settings)})


def _run(trial: Trial, steps: Sequence[int], rung: int, base: BaseModelCache, quiet: bool) -> Score | None:
    """Train a trial to the length of a rung; None where it was interrupted. One that fails has an infinite loss."""
    run, length = trial.run, steps[rung]
    try:
        with progress(f"{trial.title}  {length} steps", quiet=quiet):
            if not run.config_file.exists():
                result = start_run(trial.config, quiet=True, base=base)
            else:
                if rung and run.config().train.max_steps == steps[rung - 1]:
                    with run.locked():
                        for step in run.saved_steps():
                            if step > hold(steps[rung - 1]):
                                remove_folder(run.checkpoint(step))
                words = [f"train.{key}={value}" for key, value in _rung(steps, rung).items()]
                result = resume_run(run.path, words, accept_changes=True, quiet=True, base=base)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{trial.title}  {GOES_ON}") from None
    except LorafitError as error:
        write_file(trial.error_file, f"{error}\n")
        return Score(trial.name, length, math.inf, 0.0)
    if not result.finished:
        return None
    first = hold(steps[rung - 1]) if rung else 0
    seconds, loss = 0.0, math.inf
    for event in read_metrics(run.metrics_file):
        if event["event"] == "step" and event["step"] > first:
            seconds += event["seconds"]
        elif event["event"] == "heldout" and event["step"] == length:
            loss = event["loss"]
    if loss == math.inf:
        raise RunError(
            "no row is held out, so runs cannot be compared", place="data.holdout", hint="give more rows"
        )
    return Score(trial.name, length, loss, seconds)


def _write_recipe(
    folder: Path, trial: Trial, best: Score, config: Config, scores: Sequence[Score], about: str
) -> Path:
    """The recipe of the best trial, `config`, with its evidence as comments; `lorafit train` reads it."""
    values = with_absolute_paths(config).model_dump(mode="json", exclude_unset=True)
    others = sorted(score.loss for score in scores if score.steps == best.steps and score.trial != best.trial)
    seconds = sum(score.seconds for score in scores)
    lines = [
        f"# {one_line(trial.title)}: held-out loss {best.loss:.4f} after {best.steps} steps,",
        f"# the best of {len({score.trial for score in scores})} points; the search took {seconds:.0f} s of steps.",
        *(f"# The next one of this length had {loss:.4f}." for loss in others[:1]),
        f"# It trains {about}.",
    ]
    path = folder / RECIPE
    write_file(
        path, "\n".join(lines) + "\n" + dump_values({key: part for key, part in values.items() if part})
    )
    return path


def _tuned(
    trials: Mapping[str, Trial], scores: Sequence[Score], recipe: Path | None, about: str = ""
) -> Tuned:
    """The trials in order: by the lowest loss at any length."""
    lowest = {score.trial: score.loss for score in sorted(scores, key=lambda score: -score.loss)}
    ordered = sorted(trials.values(), key=lambda trial: lowest.get(trial.name, math.inf))
    return Tuned([TrialResult.of(trial) for trial in ordered], scores, recipe, about)


def _as_dict(score: Score) -> dict[str, Any]:
    """As JSON values; JSON has no infinite number."""
    return {**asdict(score), "loss": score.loss if math.isfinite(score.loss) else None}


def _stored(folder: Path) -> dict[str, Any] | None:
    """What a search in `folder` has stored, None where there is none. Raises RunError where it cannot be read."""
    try:
        stored = read_json(folder / _RESULTS, MB)
        assert isinstance(stored, dict)
        return {key: stored[key] for key in ("vary", "points", "lengths", "usual", "scores")}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, AssertionError):
        raise RunError("the search cannot be read", place=str(folder / _RESULTS)) from None


def _write(folder: Path, stored: Mapping[str, Any]) -> None:
    write_file(folder / _RESULTS, json.dumps(stored, indent=1) + "\n")
