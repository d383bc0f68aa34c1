"""The curves of a run's steps, thinned while they are read: exact for short runs, of bounded size for long ones."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorafit.observe.metrics_file import event_of, number

NAMES = ("loss", "learning_rate", "grad_norm", "memory_bytes", "tokens", "seconds", "supervised_tokens")
MOST = 8192  # parts of a curve; a power of two
_BLOCK = 1 << 21  # bytes of lines that are parsed together
_FEW = 500  # lines; fewer are not worth the start of a parser
_TOO_LARGE = 1e100  # see `metrics_file.number`
Values = NDArray[np.float64]


class Curve:
    """(step, value) in order. Up to MOST of them are kept; of more, the lowest, highest and mean of equal parts."""

    def __init__(self) -> None:
        self._size = 1  # points of a part
        self._parts = np.empty((6, 0))  # by row: step and value of the lowest, of the highest, means of both
        self._rest = np.empty((2, 0))  # points after the last part
        self._ends: list[tuple[float, float]] = []  # the first and the last point

    def add(self, steps: Values, values: Values) -> None:
        """Append points; those that are no number are left out."""
        usable = ~(np.isnan(steps) | np.isnan(values))
        points = np.stack([steps[usable], values[usable]])
        if not points.shape[1]:
            return
        self._ends = [*self._ends[:1], *((float(x), float(y)) for x, y in points[:, [0, -1]].T)]
        self._ends = [self._ends[0], self._ends[-1]]
        rest = np.concatenate([self._rest, points], axis=1)
        while count := min(rest.shape[1] // self._size, MOST - self._parts.shape[1]):
            head, rest = np.split(rest, [count * self._size], axis=1)
            self._parts = np.concatenate([self._parts, _parts(head.reshape(2, count, self._size))], axis=1)
            if self._parts.shape[1] == MOST:
                self._parts, self._size = _halved(self._parts), 2 * self._size
        self._rest = rest

    def points(self) -> list[tuple[float, float]]:
        """The first and the last point, and between them every point, or the lowest and highest of each part."""
        if self._size == 1:
            return _pairs(np.concatenate([self._parts[:2], self._rest], axis=1))
        low, high = self._parts[:2], self._parts[2:4]
        order = low[0] <= high[0]
        pairs = np.stack([np.where(order, low, high), np.where(order, high, low)], axis=2).reshape(2, -1)
        found = [self._ends[0], *_pairs(np.concatenate([pairs, self._rest], axis=1)), self._ends[-1]]
        return list(dict.fromkeys(found))

    def means(self) -> list[tuple[float, float]]:
        """Every point, or the mean of each part."""
        if self._size == 1:
            return self.points()
        rest = self._rest.mean(axis=1, keepdims=True) if self._rest.shape[1] else self._rest
        return _pairs(np.concatenate([self._parts[4:], rest], axis=1))


class StepCurves:
    """The curves of all steps of a run, by the name of the value, and the sums of some values."""

    def __init__(self) -> None:
        self.curves = {name: Curve() for name in (*NAMES[:4], "tokens_per_second")}
        self.sums = dict.fromkeys(NAMES[4:], 0.0)
        self.num_damaged = 0
        self._lines: list[bytes] = []
        self._num_bytes = 0

    def add(self, line: bytes) -> None:
        """Take the line of a step."""
        self._lines.append(line)
        self._num_bytes += len(line)
        if self._num_bytes >= _BLOCK:
            self.flush()

    def flush(self) -> None:
        """Read the lines that were taken: all at once, or one by one where one of them is damaged."""
        lines, self._lines, self._num_bytes = self._lines, [], 0
        if not lines:
            return
        columns = _parsed(lines) if len(lines) >= _FEW else None
        if columns is None:
            events = [event_of(line) for line in lines]
            self.num_damaged += events.count(None)
            columns = _columns([event for event in events if event is not None])
        steps = columns["step"]
        for name in NAMES[:4]:
            self.curves[name].add(steps, columns[name])
        with np.errstate(all="ignore"):
            speed = np.where(columns["seconds"] > 1e-9, columns["tokens"] / columns["seconds"], np.nan)
        self.curves["tokens_per_second"].add(steps, speed)
        for name in self.sums:
            self.sums[name] += float(np.nansum(columns[name]))


def _parsed(lines: list[bytes]) -> dict[str, Values] | None:
    """The values of NAMES in lines of JSON, NaN where there is none; None where a line has none that fits."""
    import pyarrow as pa
    from pyarrow import json as arrow_json

    schema = pa.schema([(name, pa.float64()) for name in ("step", *NAMES)])
    options = arrow_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    reading = arrow_json.ReadOptions(use_threads=False, block_size=2 * _BLOCK)
    try:
        table = arrow_json.read_json(io.BytesIO(b"".join(lines)), reading, options)
    except pa.ArrowException:
        return None
    if table.num_rows != len(lines):
        return None
    return {name: _shown(np.array(table[name].to_numpy(), dtype=np.float64)) for name in ("step", *NAMES)}


def _columns(events: list[Mapping[str, Any]]) -> dict[str, Values]:
    """As `_parsed`, of events."""
    found = {name: [number(event.get(name)) for event in events] for name in ("step", *NAMES)}
    return {name: np.array(values, dtype=np.float64) for name, values in found.items()}


def _shown(values: Values) -> Values:
    values[~(np.abs(values) < _TOO_LARGE)] = np.nan
    return values


def _parts(points: Values) -> Values:
    """The parts of points (2, parts, size)."""
    rows = np.arange(points.shape[1])
    lowest, highest = points[1].argmin(axis=1), points[1].argmax(axis=1)
    return np.concatenate([points[:, rows, lowest], points[:, rows, highest], points.mean(axis=2)])


def _halved(parts: Values) -> Values:
    """Parts of twice the size."""
    first, second = parts[:, ::2], parts[:, 1::2]
    low = np.where(second[1] < first[1], second[:2], first[:2])
    high = np.where(second[3] > first[3], second[2:4], first[2:4])
    return np.concatenate([low, high, (first[4:] + second[4:]) / 2])


def _pairs(points: Values) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points.T.tolist()]
