"""Loss scaling for float16: small gradients are kept, and after an overflow the step is repeated with its rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorafit.errors import TrainingError


@dataclass(slots=True)
class LossScale:
    """The factor of the loss in the backward pass; 1 and inactive unless the compute type is float16.

    Micikevicius et al. (2018), but where the usual scaler skips a step that overflows, the loop repeats it with the
    same rows at half the scale, so every row is trained exactly once.
    """

    factor: float = 1.0
    calm_steps: int = 0
    active: bool = False

    @classmethod
    def for_dtype(cls, dtype: torch.dtype) -> LossScale:
        """The first scale of a compute type."""
        return cls(factor=2.0**16, active=True) if dtype == torch.float16 else cls()

    def overflowed(self, step: int) -> None:
        """Halve after non-finite gradients. Raises TrainingError where the scale is already too small."""
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
