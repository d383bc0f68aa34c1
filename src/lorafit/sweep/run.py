"""A sweep from its arguments to its results: plan the trials, train them, rank them, draw their curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.config.load import config_from_args
from lorafit.config.schema import Config
from lorafit.errors import ConfigError
from lorafit.observe.metrics_file import read_metrics, series
from lorafit.observe.run_summary import Summary, summarize
from lorafit.report.escape import render
from lorafit.report.plot import Line, line_chart
from lorafit.storage.atomic import write_file
from lorafit.sweep.space import Point, draw, grid, parse_axes
from lorafit.sweep.trials import Trial, open_sweep, plan_sweep, work, work_beside_each_other


@dataclass(frozen=True, slots=True)
class TrialResult:
    """What came of a trial; `summary` is None before its run begins."""

    trial: Trial
    summary: Summary | None

    @classmethod
    def of(cls, trial: Trial) -> TrialResult:
        """The result of a trial as it is on disk."""
        return cls(trial, summarize(trial.run) if trial.run.config_file.exists() else None)

    @property
    def state(self) -> str:
        """The state of the run, `failed` where it raised an error, `waiting` before it begins."""
        if self.trial.error_file.exists():
            return "failed"
        return self.summary.state if self.summary else "waiting"

    @property
    def loss(self) -> float | None:
        """What the trials are ranked by: the lowest held-out loss, else the last training loss."""
        if self.summary is None:
            return None
        return self.summary.loss if self.summary.heldout_loss is None else self.summary.heldout_loss

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        losses = {} if self.summary is None else self.summary.as_dict()
        return {
            "run": str(self.trial.run.path),
            "varies": self.trial.point,
            **losses,
            "state": self.state,
        }

    def cells(self) -> list[str]:
        """One row of the table: trial, values, state, step, losses."""
        cells = self.summary.cells()[2:6] if self.summary else [""] * 4
        return [self.trial.name, *self.trial.point.values(), self.state, *cells]


def plan_points(
    vary: Sequence[str],
    draws: int | None,
    seed: int,
    settings: Sequence[str],
    recipe: str | None,
    flags: Mapping[str, object],
) -> list[tuple[Point, Config]]:
    """Every combination of what varies, or `draws` random ones, each with its config. Raises ConfigError."""
    axes = parse_axes(vary)
    if not axes:
        hint = "for example `--vary lora.rank=8,16,32`"
        raise ConfigError("a sweep needs something that varies", hint=hint)
    points = draw(axes, draws, seed) if draws is not None else grid(axes)
    planned = []
    for point in points:
        words = [
            "run.verify=false",
            "train.refit=false",
            *settings,
            *(f"{key}={value}" for key, value in point.items()),
        ]
        common = {key: value for key, value in flags.items() if key not in point}
        planned.append((point, config_from_args(words, recipe, common)))
    return planned


def run_sweep(
    folder: Path,
    planned: Sequence[tuple[Point, Config]] | None,
    jobs: int,
    announce: Callable[[Trial, str], None],
    quiet: bool,
) -> tuple[list[TrialResult], int]:
    """Train the trials of `folder`, made from `planned` or (None) as they are there, in `jobs` processes.

    Returns the results, best first, and the exit code: 130 where the sweep was interrupted, 2 where a trial failed.
    """
    trials = open_sweep(folder) if planned is None else plan_sweep(folder, planned)
    if jobs > 1 and sum(not trial.finished for trial in trials) > 1:
        interrupted = work_beside_each_other(folder, jobs) == 130
    else:
        interrupted = not work(trials, announce, quiet=quiet)
    results = [TrialResult.of(trial) for trial in trials]
    results.sort(key=lambda result: (result.loss is None, result.loss or 0.0))
    failed = any(result.state == "failed" for result in results)
    return results, 130 if interrupted else 2 if failed else 0


def draw_curves(folder: Path, results: Sequence[TrialResult]) -> Path:
    """Write the held-out losses over steps as a picture, the best trial boldest; returns its file."""
    lines: list[Line] = []
    for result in results:
        if result.state != "failed" and result.trial.run.metrics_file.exists():
            name = ", ".join(f"{key.partition('.')[2]}={value}" for key, value in result.trial.point.items())
            events = read_metrics(result.trial.run.metrics_file)
            points = series((event for event in events if event["event"] == "heldout"), "loss")
            if result.summary is not None and result.summary.base_loss is not None:
                points = [(0, result.summary.base_loss), *points]
            lines.append(Line(name, str(len(lines)), points, dots=True))
    title, picture = f"Held-out loss, {folder.name}", folder / "sweep.svg"
    names = [line.name for line in lines]
    bases = [result.summary.base_loss for result in results if result.summary and result.summary.base_loss]
    steps = [step for line in lines for step, _ in line.points]
    if bases and steps:  # all trials have one base
        lines.append(Line("base", "base", [(0, bases[0]), (max(steps), bases[0])]))
    chart = line_chart(title, lines, "{:.3g}".format, zero=True)
    write_file(picture, render("sweep.svg", title=title, chart=chart, names=names))
    return picture
