"""The targets of speed.py as data, and the arithmetic from measured steps to rates."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.machine import linear_shapes
from benchmarks.programs import Outcome, Step


def linear_parameters(config: Mapping[str, Any]) -> int:
    """Frozen parameters of the products of every token: all linear layers, without the embedding and the head."""
    layer = sum(out_features * in_features for out_features, in_features in linear_shapes(config))
    return int(config["num_hidden_layers"]) * layer


def head_parameters(config: Mapping[str, Any]) -> int:
    """Parameters of the vocabulary head."""
    return int(config["vocab_size"]) * int(config["hidden_size"])


def model_flops(config: Mapping[str, Any], tokens: int, supervised: int) -> int:
    """FLOPs of the frozen products of a LoRA step: 2 forward and 2 for the input gradient, per parameter and token.

    The head counts for supervised tokens only. Attention, adapter and all other work of a step are not counted, so a
    rate from these FLOPs is a lower bound.
    """
    return 4 * (linear_parameters(config) * tokens + head_parameters(config) * supervised)


@dataclass(frozen=True, slots=True)
class Results:
    """All measurements of one run. `limits` are the outputs of machine.py, in the order of the run."""

    config: Mapping[str, Any]
    outcomes: Sequence[Outcome]
    limits: Sequence[Mapping[str, Mapping[str, float]]]

    def steps(self, program: str) -> list[Step]:
        """The measured steps of a program in all parts of the run."""
        return [step for outcome in self._of(program) for step in outcome.measured]

    def seconds(self, program: str) -> float | None:
        """Median seconds per step."""
        return _median([step.seconds for step in self.steps(program)])

    def rows_per_second(self, program: str) -> float | None:
        """Median of the steps' rates."""
        return _median([step.rows / step.seconds for step in self.steps(program) if step.rows])

    def tokens_per_second(self, program: str) -> float | None:
        """Median of the steps' rates, in tokens without padding."""
        return _median([step.tokens / step.seconds for step in self.steps(program) if step.tokens])

    def share_of_product(self, program: str) -> float | None:
        """Median of the steps' model FLOPs per second, divided by the machine's bfloat16 product rate."""
        rates = [
            model_flops(self.config, step.tokens, step.supervised) / step.seconds / 1e9
            for step in self.steps(program)
            if step.tokens and step.supervised
        ]
        return _over(_median(rates), self.product_rate("bfloat16"))

    def product_rate(self, dtype: str, way: str = "both") -> float | None:
        """Median GFLOP/s of the machine's products in a type."""
        return _median([limit[dtype][way] for limit in self.limits if dtype in limit])

    def peak_gb(self, program: str) -> float | None:
        """The largest resident memory of the program's processes, in 10^9 bytes."""
        return max((outcome.peak_bytes / 1e9 for outcome in self._of(program)), default=None)

    def first_step_seconds(self, program: str) -> float | None:
        """Median seconds from the start of the process to the end of its first optimizer step."""
        return _median([o.first_step_seconds for o in self._of(program) if o.first_step_seconds is not None])

    def warm_up_seconds(self, program: str) -> float | None:
        """Median seconds of the first step."""
        return _median([outcome.steps[0].seconds for outcome in self._of(program) if outcome.steps])

    def _of(self, program: str) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.program == program]


@dataclass(frozen=True, slots=True)
class Target:
    """One goal: at least `goal`, or at most with `at_most`. `layers`: the depth for which it is valid."""

    what: str
    goal: float
    unit: str
    value: Callable[[Results], float | None]
    at_most: bool = False
    layers: int | None = None

    def verdict(self, results: Results) -> str:
        """`pass`, `miss`, `not measured`, or the number of layers that it needs."""
        value, layers = self.value(results), results.config["num_hidden_layers"]
        if value is None:
            return "not measured"
        if self.layers not in (None, layers):
            return f"needs {self.layers} layers"
        return "pass" if (value <= self.goal if self.at_most else value >= self.goal) else "miss"

    def row(self, results: Results) -> list[str]:
        """What, target, measured, verdict."""
        value, sign = self.value(results), "<=" if self.at_most else ">="
        measured = "-" if value is None else f"{value:.2f}{self.unit}"
        return [self.what, f"{sign} {self.goal:g}{self.unit}", measured, self.verdict(results)]


def _rows_over_seed(program: str) -> Callable[[Results], float | None]:
    return lambda r: _over(r.rows_per_second(program), r.rows_per_second("seed_recipe float32"))


def _tokens_over_trl(program: str) -> Callable[[Results], float | None]:
    return lambda r: _over(r.tokens_per_second(program), r.tokens_per_second("trl_sft"))


def _share(program: str) -> Callable[[Results], float | None]:
    return lambda r: r.share_of_product(program)


def _peak(*programs: str) -> Callable[[Results], float | None]:
    return lambda r: max((peak for peak in map(r.peak_gb, programs) if peak), default=None)


TARGETS = [
    Target(
        "classic, bfloat16: rows/s over seed_recipe float32", 10, "x", _rows_over_seed("classic, bfloat16")
    ),
    Target("the same in full packs", 10, "x", _rows_over_seed("classic in packs, bfloat16")),
    Target("classic, int8: rows/s over seed_recipe float32", 15, "x", _rows_over_seed("classic, int8")),
    Target("the same in full packs", 15, "x", _rows_over_seed("classic in packs, int8")),
    Target(
        "bfloat16: tokens/s over TRL packed bfloat16",
        3.5,
        "x",
        _tokens_over_trl("answers in packs, bfloat16"),
    ),
    Target("int8: tokens/s over TRL packed bfloat16", 5, "x", _tokens_over_trl("answers in packs, int8")),
    Target(
        "bfloat16: model FLOPs/s over the bfloat16 product", 0.85, "", _share("answers in packs, bfloat16")
    ),
    Target("int8: model FLOPs/s over the bfloat16 product", 1.25, "", _share("answers in packs, int8")),
    Target(
        "peak memory, bfloat16, packs of 2048",
        4.5,
        " GB",
        _peak("classic in packs, bfloat16", "answers in packs, bfloat16"),
        at_most=True,
        layers=22,
    ),
    Target(
        "peak memory, int8, packs of 2048",
        4.0,
        " GB",
        _peak("classic in packs, int8", "answers in packs, int8"),
        at_most=True,
        layers=22,
    ),
    Target(
        "all seven linears r=16: time over q and v r=8",
        1.15,
        "x",
        lambda r: _over(
            r.seconds("all linears, r=16, no dropout, bfloat16"),
            r.seconds("q and v, r=8, no dropout, bfloat16"),
        ),
        at_most=True,
    ),
    Target(
        "start of the process to the end of the first step, classic, bfloat16",
        15,
        " s",
        lambda r: r.first_step_seconds("classic, bfloat16"),
        at_most=True,
        layers=22,
    ),
]


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _over(value: float | None, by: float | None) -> float | None:
    return value / by if value is not None and by else None
