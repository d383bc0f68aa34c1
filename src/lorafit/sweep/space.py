"""The search space of a sweep: keys with values or ranges, as a grid or as random points."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from lorafit.config.load import nearest_key
from lorafit.config.schema import keys
from lorafit.errors import ConfigError, Problem

_RANGE = re.compile(r"(.+)\.\.(.+)")
Point = dict[str, str]  # key -> value as on the command line


@dataclass(frozen=True, slots=True)
class Axis:
    """A key with `values`, or with a range from `low` to `high`, both included; `whole` draws integers."""

    key: str
    values: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    whole: bool = False

    def draw(self, source: random.Random) -> str:
        """A random value, or a random number of the range: uniform in its logarithm where the range is above zero."""
        if self.values:
            return source.choice(self.values)
        if self.low > 0:
            number = math.exp(source.uniform(math.log(self.low), math.log(self.high)))
        else:
            number = source.uniform(self.low, self.high)
        return str(round(number)) if self.whole else f"{number:.4g}"


def parse_axes(texts: Sequence[str]) -> list[Axis]:
    """Axes from `section.key=V1,V2,...` or `section.key=LOW..HIGH`. Raises ConfigError with all that is wrong."""
    axes: list[Axis] = []
    problems: list[Problem] = []
    for text in texts:
        key, equals, listed = text.partition("=")
        place = f"`--vary {text}`"
        values = tuple(value for value in _split(listed) if value)
        if not equals or not values:
            hint = "for example `--vary lora.rank=8,16,32` or `--vary train.learning_rate=1e-5..1e-3`"
            problems.append(
                Problem("what varies is `section.key=VALUE,VALUE` or `section.key=LOW..HIGH`", place, hint)
            )
        elif key not in set(keys()):
            problems.append(Problem(f"unknown key `{key}`", place, nearest_key(key)))
        elif key == "run.output" or key in {axis.key for axis in axes}:
            reason = "the sweep names its runs itself" if key == "run.output" else "name a key once"
            problems.append(Problem(f"`{key}` cannot vary here", place, reason))
        elif len(values) == 1 and (match := _RANGE.fullmatch(values[0])):
            try:
                low, high = float(match[1]), float(match[2])
            except ValueError:
                low = high = math.nan
            if not low < high < math.inf:
                problems.append(Problem("a range goes from a number up to a larger one", place))
                continue
            whole = all(re.fullmatch(r"[+-]?\d+", end) for end in match.groups())
            axes.append(Axis(key, (), low, high, whole))
        else:
            axes.append(Axis(key, values))
    if problems:
        raise ConfigError.of(problems)
    return axes


def grid(axes: Sequence[Axis]) -> list[Point]:
    """All combinations, the last axis fastest. Raises ConfigError for a range."""
    if problems := [
        Problem(f"`{axis.key}` varies over a range, which has no last point", "", "draw some with --random N")
        for axis in axes
        if not axis.values
    ]:
        raise ConfigError.of(problems)
    names = [axis.key for axis in axes]
    return [
        dict(zip(names, point, strict=True)) for point in itertools.product(*(axis.values for axis in axes))
    ]


def draw(axes: Sequence[Axis], count: int, seed: int) -> list[Point]:
    """`count` different random points, or all where there are fewer. A longer draw begins with a shorter one."""
    source = random.Random(seed)  # noqa: S311 (a search, no secret)
    points: list[Point] = []
    for _ in range(count * 20):
        point = {axis.key: axis.draw(source) for axis in axes}
        if point not in points:
            points.append(point)
        if len(points) == count:
            break
    return points


def _split(text: str) -> list[str]:
    """The parts of `text` between commas; a comma within brackets does not count."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]
