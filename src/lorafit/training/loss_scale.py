"""Loss scaling for float16: small gradients survive, and an overflow repeats the step instead of losing its rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorafit.errors import TrainingError


@dataclass(slots=True)
class LossScale:
    """What the loss is multiplied by before the backward pass; 1 and inert unless the compute type is float16.

    Micikevicius et al. (2018), but where the usual scaler skips an overflowing step, the loop repeats it with
    the same rows at half the scale, so every row is trained exactly once.
    """

    factor: float = 1.0
    calm_steps: int = 0
    active: bool = False

    @classmethod
    def for_dtype(cls, dtype: torch.dtype) -> LossScale:
        """The scale that a compute type starts with."""
        return cls(factor=2.0**16, active=True) if dtype == torch.float16 else cls()

    def overflowed(self, step: int) -> None:
        """Halve after non-finite gradients. Raises TrainingError when halving can no longer be the cure."""
        self.factor /= 2
        self.calm_steps = 0
        if self.factor < 2.0**-4:
            raise TrainingError(
                f"step {step}: the gradient is not finite at any loss scale",
                hint="lower train.learning_rate, or use model.dtype=float32",
            )

    def went_well(self) -> None:
        """Double after 2,000 steps without an overflow."""
        self.calm_steps += 1
        if self.active and self.calm_steps >= 2000:
            self.factor, self.calm_steps = min(self.factor * 2, 2.0**24), 0
