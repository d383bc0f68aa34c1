"""Charts as inline SVG, without a library: lines over steps, bars of lengths, one bar that is divided.

Lines are drawn in a box of 1000 x 1000 that is stretched to the page; labels are text beside it, so they keep their
size on a phone.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from typing import TypeVar

T = TypeVar("T")
Points = Sequence[tuple[float, float]]
Format = Callable[[float], str]
BUCKETS = 320  # a line is drawn by the least and the most of so many parts
SMOOTHED_FROM = 40  # points; fewer are shown as they are
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
    """Where values lie in the box, and the values that are labelled."""

    low: float
    high: float
    ticks: Sequence[float]
    is_log: bool = False

    def at(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        low, high, value = (math.log10(v) if self.is_log else v for v in (self.low, self.high, value))
        return (value - low) / (high - low)


def line_chart(title: str, lines: Sequence[Line], show: Format, *, log: bool = False) -> str:
    """A figure with `lines` over steps; `show` writes a value. Empty without points."""
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    x_axis, y_axis = linear_axis(min(xs), max(xs), 6, whole=True, tight=True), value_axis(ys, log=log)
    low, high = x_axis.low, x_axis.high
    parts = [f'<path class="grid" d="M0 {_y(y_axis, tick)}H{BOX:.0f}"/>' for tick in y_axis.ticks]
    for line in lines:
        drawn = extremes(line.points, low, high)
        path = "M" + "L".join(f"{_x(x_axis, x)} {_y(y_axis, y)}" for x, y in drawn)
        if len(line.points) > 1:
            parts.append(f'<path class="line {line.style}" d="{path}"/>')
        if line.dots or len(line.points) == 1:
            dots = "".join(f"M{_x(x_axis, x)} {_y(y_axis, y)}h0" for x, y in thinned(line.points, 60))
            parts.append(f'<path class="dots {line.style}" d="{dots}"/>')
    legend = "".join(
        f'<span class="key {line.style}">{escape(line.name)}</span>' for line in lines if len(lines) > 1
    )
    hover = json.dumps(
        [
            {"name": line.name, "style": line.style, "points": _told(line.points, show, x_axis)}
            for line in lines
            if line.style != "raw"
        ]
    )
    scale = " · log scale" if y_axis.is_log else ""
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b><span class="scale">{scale}</span>'
        f'<span class="keys">{legend}</span></figcaption>'
        f'<div class="plot" data-lines="{escape(hover)}" role="img" aria-label="{escape(_spoken(title, lines, show))}">'
        f'<svg viewBox="0 0 {BOX:.0f} {BOX:.0f}" preserveAspectRatio="none" aria-hidden="true">{"".join(parts)}</svg>'
        + "".join(
            f'<span class="y" style="top:{100 - 100 * y_axis.at(tick):.2f}%">{escape(show(tick))}</span>'
            for tick in y_axis.ticks
        )
        + "".join(
            f'<span class="x" style="left:{100 * x_axis.at(tick):.2f}%">{tick:,.0f}</span>'
            for tick in x_axis.ticks
        )
        + '<i class="cursor"></i><span class="tip"></span></div></figure>'
    )


def bars(title: str, edges: Sequence[float], counts: Sequence[tuple[str, str, Sequence[int]]]) -> str:
    """A histogram: `counts` are (name, CSS class, rows in each bin), stacked."""
    num_bins = len(edges) - 1
    if num_bins < 1 or any(len(rows) != num_bins for _, _, rows in counts):
        return ""
    totals = [sum(rows[i] for _, _, rows in counts) for i in range(num_bins)]
    if not max(totals):
        return ""
    y_axis = linear_axis(0, max(totals), 4, whole=True)
    x_axis = linear_axis(edges[0], edges[-1], 6, whole=True, tight=True)
    parts = [f'<path class="grid" d="M0 {_y(y_axis, tick)}H{BOX:.0f}"/>' for tick in y_axis.ticks]
    for index in range(num_bins):
        left, right = (BOX * x_axis.at(edge) for edge in edges[index : index + 2])
        base = 0
        for _, style, rows in counts:
            if rows[index]:
                top = base + rows[index]
                height = BOX * (y_axis.at(top) - y_axis.at(base))
                parts.append(
                    f'<rect class="{style}" x="{left + 1:.1f}" y="{_y(y_axis, top)}" '
                    f'width="{max(right - left - 2, 1):.1f}" height="{height:.1f}"/>'
                )
                base = top
    legend = "".join(f'<span class="key {style}">{escape(name)}</span>' for name, style, _ in counts)
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b><span class="keys">{legend}</span></figcaption>'
        f'<div class="plot" role="img" aria-label="{escape(title)}: {sum(totals):,} rows up to {edges[-1]:,.0f}">'
        f'<svg viewBox="0 0 {BOX:.0f} {BOX:.0f}" preserveAspectRatio="none" aria-hidden="true">{"".join(parts)}</svg>'
        + "".join(
            f'<span class="y" style="top:{100 - 100 * y_axis.at(tick):.2f}%">{tick:,.0f}</span>'
            for tick in y_axis.ticks
        )
        + "".join(
            f'<span class="x" style="left:{100 * x_axis.at(tick):.2f}%">{tick:,.0f}</span>'
            for tick in x_axis.ticks
        )
        + "</div></figure>"
    )


def divided(parts: Sequence[tuple[str, str, int]]) -> str:
    """One bar in parts (name, CSS class, count) whose widths are their shares."""
    total = sum(count for _, _, count in parts)
    if not total:
        return ""
    pieces = "".join(
        f'<span class="{style}" style="width:{100 * count / total:.3f}%" title="{escape(name)}: {count:,}"></span>'
        for name, style, count in parts
        if count
    )
    return f'<div class="divided">{pieces}</div>'


def extremes(points: Points, low: float, high: float, buckets: int = BUCKETS) -> list[tuple[float, float]]:
    """At most 2 * `buckets` + 2 of `points`, in order: first, last, and the least and most of each part."""
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
    """At most `most` of `points`, evenly, with the first and the last."""
    if len(points) <= most:
        return list(points)
    return [points[round(index * (len(points) - 1) / (most - 1))] for index in range(most)]


def smoothed(points: Points) -> list[tuple[float, float]]:
    """Means over about a thirtieth of the points around each, fewer towards the ends, so that nothing lags."""
    half = max(1, min(len(points) // 60, 200))
    sums = list(accumulate((y for _, y in points), initial=0.0))
    line = []
    for at, (x, _) in enumerate(points):
        reach = min(half, at, len(points) - 1 - at)
        line.append((x, (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)))
    return line


def value_axis(values: Sequence[float], *, log: bool = False) -> Axis:
    """An axis for `values`; logarithmic where that is asked for and a few values dwarf the others."""
    low, high = min(values), max(values)
    if log and low > 0 and high / statistics.median(values) > 8 and high / low > 30:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        step = max(1, (last - first) // 4)
        return Axis(10.0**first, 10.0**last, [10.0**power for power in range(first, last + 1, step)], True)
    if low > 0 and low < 0.4 * high:
        low = 0.0
    return linear_axis(low, high, 4)


def linear_axis(low: float, high: float, about: int, *, whole: bool = False, tight: bool = False) -> Axis:
    """Round ticks, about so many; the axis ends at ticks, or (`tight`) at the values themselves."""
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


def _x(axis: Axis, value: float) -> str:
    return f"{BOX * axis.at(value):.1f}"


def _y(axis: Axis, value: float) -> str:
    return f"{BOX * (1 - axis.at(value)):.1f}"


def _told(points: Points, show: Format, axis: Axis) -> list[tuple[float, str, str]]:
    """(share of the width, step, value) of some points, for the pointer."""
    return [(round(axis.at(x), 4), f"{x:,.0f}", show(y)) for x, y in thinned(points, BUCKETS)]


def _spoken(title: str, lines: Sequence[Line], show: Format) -> str:
    """The chart for those who do not see it."""
    told = [
        f"{line.name} from {show(line.points[0][1])} to {show(line.points[-1][1])}"
        for line in lines
        if line.style != "raw"
    ]
    return f"{title}: {'; '.join(told)}"
