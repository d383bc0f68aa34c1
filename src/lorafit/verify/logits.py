"""The comparison of logits: a difference passes if noise and rounding explain it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Difference:
    """The size of a difference, and the largest one that is accepted."""

    size: float
    bound: float

    @property
    def is_accepted(self) -> bool:
        """False also if the difference is not a number."""
        return self.size <= self.bound


def difference(
    logits: Tensor,
    reference: Tensor,
    measure: Callable[[Tensor], float],
    *,
    noise: float = 0.0,
    times_noise: float = 0.0,
    scale: float,
    share: float,
) -> Difference:
    """The difference of two tables of logits, in `measure`; accepted up to times_noise * noise + share * scale."""
    return Difference(measure(logits - reference), times_noise * noise + share * scale)


def rms(values: Tensor) -> float:
    """Root mean square."""
    return float(values.double().square().mean().sqrt())


def largest(values: Tensor) -> float:
    """Largest magnitude; infinite if a value is not a number."""
    return float(values.abs().nan_to_num(nan=float("inf")).max())
