"""Held-out loss over steps of several runs as one SVG picture: text, no scripts, readable in any browser."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 900, 460, 64, 40, 270, 44
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e")
Curve = Sequence[tuple[int, float]]  # (step, loss)


def curves_svg(title: str, curves: Mapping[str, Curve]) -> str:
    """The picture of `curves` by name, in the order of the legend: the first is drawn boldest and last."""
    points = [point for curve in curves.values() for point in curve if math.isfinite(point[1])]
    last = max((step for step, _ in points), default=1)
    low = min((loss for _, loss in points), default=0.0)
    high = max((loss for _, loss in points), default=1.0)
    room = (high - low) * 0.05 or 0.5
    low, high = low - room, high + room
    plot_width, plot_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(step: float) -> float:
        return LEFT + plot_width * step / last

    def y(loss: float) -> float:
        return TOP + plot_height * (high - loss) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="12" fill="#222">',
        f'<title>{escape(title)}</title><rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="22" font-size="15">{escape(title)}</text>',
    ]
    for part in range(5):
        loss, step = low + (high - low) * part / 4, last * part / 4
        parts.append(
            f'<line x1="{LEFT}" x2="{LEFT + plot_width}" y1="{y(loss):.1f}" y2="{y(loss):.1f}" stroke="#ddd"/>'
            f'<text x="{LEFT - 8}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:.3f}</text>'
            f'<text x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{step:.0f}</text>'
        )
    parts.append(f'<text x="{LEFT + plot_width / 2}" y="{HEIGHT - 8}" text-anchor="middle">step</text>')
    for number, (name, curve) in reversed(list(enumerate(curves.items()))):
        colour, width = COLOURS[number % len(COLOURS)], 3 if number == 0 else 1.5
        drawn = [(x(step), y(loss)) for step, loss in curve if math.isfinite(loss)]
        line = " ".join(f"{at:.1f},{up:.1f}" for at, up in drawn)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="{width}"/>')
        parts += [f'<circle cx="{at:.1f}" cy="{up:.1f}" r="2.5" fill="{colour}"/>' for at, up in drawn]
        down = TOP + 16 * number
        if down < HEIGHT - BOTTOM:
            left = LEFT + plot_width + 18
            parts.append(
                f'<rect x="{left}" y="{down}" width="14" height="4" fill="{colour}"/>'
                f'<text x="{left + 20}" y="{down + 7}">{escape(name)}</text>'
            )
    return "\n".join([*parts, "</svg>", ""])
