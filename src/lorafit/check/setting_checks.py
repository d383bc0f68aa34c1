"""Settings that are allowed and still look like a mistake: rate, warm-up, length of the run, scale of the adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorafit.check.verdict import CheckResult

# The rate up to which LoRA on a model of a billion parameters is known to train; smaller models bear more.
_USUAL_RATE, _USUAL_PARAMETERS, _POWER = 1e-3, 1e9, 0.25
_LEAST_RATE = 1e-6
_SCALES = (0.05, 16.0)  # of alpha / rank, what anybody uses and some more
_MANY_EPOCHS = 10


@dataclass(frozen=True, slots=True)
class RunSettings:
    """What of a run is checked here; `num_parameters` is None where no model is known.

    `warmup` is as in the config: a share below 1, or steps. `scale` is what the adapter's output is multiplied by
    with alpha / rank.
    """

    num_steps: int
    rows_per_epoch: int
    batch_size: int
    learning_rate: float
    schedule: str
    warmup: float
    scale: float
    holdout: float
    num_held_out: int
    num_parameters: int | None
    patience: int


def setting_verdicts(given: RunSettings) -> list[CheckResult]:
    """A verdict for each thing, in the order of the config."""
    return [_scale(given), _held_out(given), _steps(given), _rate(given), _warmup(given)]


def highest_rate(num_parameters: int) -> float:
    """The learning rate above which a model of that size is not usually trained with LoRA."""
    return _USUAL_RATE * math.pow(max(1.0, _USUAL_PARAMETERS / num_parameters), _POWER)


def _scale(given: RunSettings) -> CheckResult:
    low, high = _SCALES
    if low <= given.scale <= high:
        return CheckResult("adapter scale", "pass", f"lora.alpha / lora.rank is {given.scale:g}")
    what = "drowns the base" if given.scale > high else "hardly acts"
    message = f"lora.alpha / lora.rank is {given.scale:g}: the adapter {what}"
    return CheckResult("adapter scale", "warn", message, "lora.alpha", "the usual is 1 or 2 times lora.rank")


def _held_out(given: RunSettings) -> CheckResult:
    name = "held-out rows"
    if given.num_held_out:
        return CheckResult(name, "pass", f"{given.num_held_out:,} rows measure what training does not see")
    if given.patience:
        message = "train.patience waits for held-out measurements, but no row is held out"
        return CheckResult(
            name, "fail", message, "train.patience", "give data.holdout, or leave train.patience out"
        )
    if given.holdout:
        message = "too few rows to hold any out: the loss on unseen rows is not measured"
        return CheckResult(name, "warn", message, "data.holdout", "at least ten rows are needed for one")
    return CheckResult(name, "pass", "none, as data.holdout=0 says: the loss on unseen rows is not measured")


def _steps(given: RunSettings) -> CheckResult:
    wanted = given.num_steps * given.batch_size
    epochs = wanted / given.rows_per_epoch
    message = f"{given.num_steps:,} steps of {given.batch_size} rows, {epochs:.3g} epochs"
    if wanted < given.rows_per_epoch:
        left = given.rows_per_epoch - wanted
        message += f": {left:,} of {given.rows_per_epoch:,} rows are never trained"
        return CheckResult(
            "steps", "warn", message, "train.max_steps or train.epochs", "give more, or fewer rows"
        )
    if epochs > _MANY_EPOCHS:
        message += ": so many teach rows by heart"
        return CheckResult(
            "steps", "warn", message, "train.epochs", "watch the held-out loss, or train.patience=3"
        )
    return CheckResult("steps", "pass", message)


def _rate(given: RunSettings) -> CheckResult:
    name, key, rate = "learning rate", "train.learning_rate", given.learning_rate
    if rate < _LEAST_RATE:
        message = f"{rate:g} is so small that hardly anything is learnt"
        return CheckResult(name, "warn", message, key, "the usual for LoRA is 1e-4 to 5e-4")
    if given.num_parameters is None:
        highest, size = highest_rate(1), "any model"
    else:
        highest, size = highest_rate(given.num_parameters), f"{given.num_parameters / 1e6:,.0f} M parameters"
    if rate > highest:
        message = f"{rate:g} is above what LoRA on {size} is known to bear ({highest:.1g})"
        return CheckResult(name, "warn", message, key, "the usual is 1e-4 to 5e-4")
    return CheckResult(name, "pass", f"peak {rate:g}, {given.schedule}")


def _warmup(given: RunSettings) -> CheckResult:
    asked = math.ceil(given.warmup * given.num_steps) if given.warmup < 1 else int(given.warmup)
    message = f"{asked:,} of {given.num_steps:,} steps"
    if given.num_steps > 1 and asked > given.num_steps / 2:
        message += ": the peak rate is reached late or never"
        return CheckResult(
            "warm-up", "warn", message, "train.warmup", "a share such as 0.03 fits every length"
        )
    return CheckResult("warm-up", "pass", message)
