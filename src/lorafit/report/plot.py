"""The geometry of charts: lines over steps and histograms, in a box of 1000 x 1000. Templates draw them as SVG."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TypeVar

T = TypeVar("T")
Points = Sequence[tuple[float, float]]
Format = Callable[[float], str]
BUCKETS = 320  # parts of a line; its lowest and highest point in each are drawn
SMOOTHED_FROM = 40  # points; fewer are not smoothed
BOX = 1000.0


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart. `style` is its CSS class: raw, train, held, base, one."""

    name: str
    style: str
    points: Points
    dots: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """The range of values, and those that are labelled."""

    low: float
    high: float
    ticks: Sequence[float]
    is_log: bool = False

    def at(self, value: float) -> float:
        """0 at the low end, 1 at the high end."""
        low, high, value = (math.log10(v) if self.is_log else v for v in (self.low, self.high, value))
        return (value - low) / (high - low)


@dataclass(frozen=True, slots=True)
class Bar:
    """One piece of a stacked bar, in the box."""

    style: str
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure as `sections.html` draws it. Places of labels are shares of the box, from its left and its top."""

    title: str
    description: str  # for those who do not see the figure
    keys: Sequence[tuple[str, str]]  # of the legend: (name, CSS class)
    y_labels: Sequence[tuple[float, str]]
    x_labels: Sequence[tuple[float, str]]
    paths: Sequence[tuple[str, str]] = ()  # (CSS class, path)
    bars: Sequence[Bar] = ()
    hover: str = ""  # JSON for page.js: the values under the pointer
    is_log: bool = False
    is_tall: bool = False


def line_chart(
    title: str,
    lines: Sequence[Line],
    show: Format,
    *,
    log: bool = False,
    tall: bool = False,
    zero: bool = False,
    span: tuple[float, float] | None = None,
    phases: Sequence[float] = (),
) -> Chart | None:
    """A figure with `lines` over steps from 0 on, None without points; `show` writes a value, `zero` begins the values
    at 0. With `span` only the steps from its first to its second are shown. After each step of `phases` lines begin
    anew.
    """
    if span is not None:
        inside = [[point for point in line.points if span[0] <= point[0] <= span[1]] for line in lines]
        lines = [replace(line, points=points) for line, points in zip(lines, inside, strict=True)]
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + [0.0] * zero
    low, high = span or (min(0, *xs), max(0, *xs))
    x_axis, y_axis = linear_axis(low, high, 6, whole=True, tight=True), value_axis(ys, log=log)

    def place(point: tuple[float, float]) -> str:
        return f"{BOX * x_axis.at(point[0]):.1f} {BOX * (1 - y_axis.at(point[1])):.1f}"

    paths = []
    for line in lines:
        if len(line.points) > 1:
            drawn = extremes(line.points, x_axis.low, x_axis.high)
            parts = ("L".join(map(place, part)) for part in divided(drawn, phases) if part)
            paths.append((f"line {line.style}", "".join(f"M{part}" for part in parts)))
        if line.dots or len(line.points) == 1:
            dots = "".join(f"M{place(point)}h0" for point in thinned(line.points, 60))
            paths.append((f"dots {line.style}", dots))
    named = [line for line in lines if line.style != "raw"]
    ends = (f"{line.name} from {show(line.points[0][1])} to {show(line.points[-1][1])}" for line in named)
    hover = [
        {
            "name": line.name,
            "style": line.style,
            "points": [
                (round(x_axis.at(x), 4), f"{x:,.0f}", show(y)) for x, y in thinned(line.points, BUCKETS)
            ],
        }
        for line in named
    ]
    return Chart(
        title,
        f"{title}: {'; '.join(ends)}",
        keys=[(line.name, line.style) for line in lines] if len(lines) > 1 else [],
        y_labels=_distinct([(1 - y_axis.at(tick), show(tick)) for tick in y_axis.ticks]),
        x_labels=_whole_labels(x_axis),
        paths=paths,
        hover=json.dumps(hover),
        is_log=y_axis.is_log,
        is_tall=tall,
    )


def histogram(
    title: str, edges: Sequence[float], counts: Sequence[tuple[str, str, Sequence[int]]]
) -> Chart | None:
    """Stacked bars: `counts` are (name, CSS class, rows in each bin). None where there are no rows."""
    num_bins = len(edges) - 1
    if num_bins < 1 or any(len(rows) != num_bins for _, _, rows in counts):
        return None
    totals = [sum(rows[index] for _, _, rows in counts) for index in range(num_bins)]
    if not max(totals):
        return None
    y_axis = linear_axis(0, max(totals), 4, whole=True)
    x_axis = linear_axis(edges[0], edges[-1], 6, whole=True, tight=True)
    bars = []
    for index in range(num_bins):
        left, right = (BOX * x_axis.at(edge) for edge in edges[index : index + 2])
        base = 0
        for _, style, rows in counts:
            if rows[index]:
                top = base + rows[index]
                height = BOX * (y_axis.at(top) - y_axis.at(base))
                bars.append(
                    Bar(style, left + 1, BOX * (1 - y_axis.at(top)), max(right - left - 2, 1), height)
                )
                base = top
    return Chart(
        title,
        f"{title}: {sum(totals):,} rows up to {edges[-1]:,.0f}",
        keys=[(name, style) for name, style, _ in counts],
        y_labels=[(1 - share, text) for share, text in _whole_labels(y_axis)],
        x_labels=_whole_labels(x_axis),
        bars=bars,
    )


def extremes(points: Points, low: float, high: float, buckets: int = BUCKETS) -> list[tuple[float, float]]:
    """At most 2 * `buckets` + 2 of `points`, in order: first, last, and the lowest and highest of each part."""
    if len(points) <= 2 * buckets:
        return list(points)
    parts: dict[int, list[tuple[float, float]]] = {}
    for point in points:
        share = (point[0] - low) / (high - low) if high > low else 0.0
        parts.setdefault(min(buckets - 1, int(share * buckets)), []).append(point)
    kept = [points[0]]
    for part in parts.values():
        pair = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept += sorted(pair)
    return [*kept, points[-1]]


def thinned(points: Sequence[T], most: int) -> list[T]:
    """At most `most` of `points`, evenly spaced, with the first and the last."""
    if len(points) <= most:
        return list(points)
    return [points[round(index * (len(points) - 1) / (most - 1))] for index in range(most)]


def divided(points: Points, phases: Sequence[float]) -> list[Points]:
    """The points up to each step of `phases`, and those after the last one."""
    ends = [-math.inf, *phases, math.inf]
    return [[point for point in points if low < point[0] <= high] for low, high in pairwise(ends)]


def smoothed(points: Points, parts: int = 30, phases: Sequence[float] = ()) -> list[tuple[float, float]]:
    """Centred means over one of `parts` of the points, of fewer points towards the ends; 0 leaves them. No mean reaches
    over a step of `phases`.
    """
    if not parts:
        return list(points)
    if phases:
        return [point for part in divided(points, phases) for point in smoothed(part, parts)]
    half = max(1, min(len(points) // (2 * parts), 6000 // parts))
    sums = list(accumulate((y for _, y in points), initial=0.0))
    line = []
    for index, (x, _) in enumerate(points):
        reach = min(half, index, len(points) - 1 - index)
        line.append((x, (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)))
    return line


def value_axis(values: Sequence[float], *, log: bool = False) -> Axis:
    """An axis for `values`; logarithmic if `log` and if a few values are far above the median."""
    low, high = min(values), max(values)
    if log and low > 0 and high / statistics.median(values) > 8 and high / low > 30:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        step = max(1, (last - first) // 4)
        return Axis(10.0**first, 10.0**last, [10.0**power for power in range(first, last + 1, step)], True)
    if low > 0 and low < 0.4 * high:
        low = 0.0
    return linear_axis(low, high, 4)


def linear_axis(low: float, high: float, about: int, *, whole: bool = False, tight: bool = False) -> Axis:
    """An axis with `about` ticks at round values. It ends at ticks, or (`tight`) at `low` and `high`."""
    if not high - low > max(1e-12 * abs(low), 1e-100):
        room = abs(low) * 0.1 or 1.0
        low, high = (low - (0 if tight else room), high + room)
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    step = max(1.0, float(round(step))) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [float(f"{index * step:.12g}") for index in range(first, last + 1)]
    if tight:
        return Axis(low, high, [tick for tick in ticks if low <= tick <= high])
    return Axis(ticks[0], ticks[-1], ticks)


def _distinct(labels: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """`labels` without those of the same text as one before: values that are too close for their format."""
    return [
        label for index, label in enumerate(labels) if label[1] not in {text for _, text in labels[:index]}
    ]


def _whole_labels(axis: Axis) -> list[tuple[float, str]]:
    return [(axis.at(tick), f"{tick:,.0f}") for tick in axis.ticks]
