"""The picture of a sweep: for each setting that differs, the loss of each run over the values of the setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorafit.report.plot import BOX, Chart, value_axis

LEAST_RUNS, MOST_CHARTS, MOST_VALUES = 3, 6, 12


@dataclass(frozen=True, slots=True)
class Trial:
    """One run: its name, the CSS class of its colour, its loss, and its settings as texts."""

    name: str
    style: str
    loss: float
    keys: Mapping[str, str]


def setting_charts(trials: Sequence[Trial], keys: Sequence[str]) -> list[Chart]:
    """A chart per key of `keys` with at most MOST_VALUES values; none of fewer than LEAST_RUNS runs.

    A key that divides the runs as an earlier one does has no chart. Values stand beside
    each other in order, at equal distances. The line joins the lowest loss of each.
    """
    charts: list[Chart] = []
    if len(trials) < LEAST_RUNS:
        return charts
    axis = value_axis([trial.loss for trial in trials])
    trials = sorted(trials, key=lambda trial: trial.loss)
    divisions = []
    for key in keys:
        groups: dict[str, list[Trial]] = {}
        for trial in trials:
            groups.setdefault(trial.keys.get(key, ""), []).append(trial)
        values = sorted(groups, key=_order)
        division = {frozenset(trial.name for trial in group) for group in groups.values()}
        if not 1 < len(values) <= MOST_VALUES or division in divisions or len(charts) == MOST_CHARTS:
            continue
        divisions.append(division)
        places = {value: (index + 0.5) / len(values) for index, value in enumerate(values)}
        points = {
            value: [f"{BOX * places[value]:.1f} {BOX * (1 - axis.at(trial.loss)):.1f}" for trial in group]
            for value, group in groups.items()
        }
        lowest = [points[value][0] for value in values]
        dots = [
            (f"dots {trial.style}", f"M{point}h0")
            for value, group in groups.items()
            for trial, point in zip(group, points[value], strict=True)
        ]
        charts.append(
            Chart(
                key,
                f"{key}: the lowest loss is {trials[0].loss:.3g} with {trials[0].keys.get(key, '')}",
                keys=[],
                y_labels=[(1 - axis.at(tick), f"{tick:.3g}") for tick in axis.ticks],
                x_labels=[(places[value], value[:16] or "–") for value in values],
                paths=[("line base", "M" + "L".join(lowest)), *dots],
            )
        )
    return charts


def _order(value: str) -> tuple[bool, float, str]:
    """Numbers in order, then texts."""
    try:
        return False, float(value), value
    except ValueError:
        return True, 0.0, value
