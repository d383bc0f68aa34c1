"""Settings that are valid but look like a mistake: rate, warm-up, length of the run, scale of the adapter."""

from __future__ import annotations

from lorafit.config.auto import LEAST_STEPS, Sizes, auto_epochs
from lorafit.config.schema import Config, TrainSection
from lorafit.data.row_order import RowOrder
from lorafit.errors import CheckResult
from lorafit.observe.units import count

# The highest rate known to work for LoRA on a model of a billion parameters; smaller models tolerate higher rates.
_USUAL_RATE, _USUAL_PARAMETERS, _POWER = 1e-3, 1e9, 0.25
_LEAST_RATE = 1e-6
_SCALES = (0.05, 16.0)  # of alpha / rank: the usual values and a margin
_MANY_EPOCHS = 10


def setting_verdicts(config: Config, order: RowOrder, sizes: Sizes) -> list[CheckResult]:
    """A result for each setting, in the order of the config."""
    num_steps = order.num_steps(config.train.epochs, config.train.max_steps)
    return [
        _scale(config.lora.alpha / config.lora.rank),
        _held_out(config, sizes.held_out),
        _steps(num_steps, order, auto_epochs(sizes))
        if config.train.budget is None
        else CheckResult("steps", "pass", f"as many as fit into train.budget={config.train.budget}"),
        _rate(config.train, sizes.parameters),
        *([_warmup(config.train, num_steps)] if config.train.budget is None else []),
    ]


def _scale(scale: float) -> CheckResult:
    message = f"lora.alpha / lora.rank is {scale:g}"
    low, high = _SCALES
    if low <= scale <= high:
        return CheckResult("adapter scale", "pass", message)
    effect = "can overwhelm the base model" if scale > high else "has almost no effect"
    hint = "the usual is 1 or 2 times lora.rank"
    return CheckResult("adapter scale", "warn", f"{message}: the adapter {effect}", "lora.alpha", hint)


def _held_out(config: Config, num_held_out: int) -> CheckResult:
    name = "held-out rows"
    if num_held_out:
        return CheckResult(name, "pass", f"{num_held_out:,} rows that are not trained measure the loss")
    if config.train.patience:
        message = "train.patience needs held-out measurements, but no row is held out"
        hint = "give data.holdout, or leave train.patience out"
        return CheckResult(name, "fail", message, "train.patience", hint)
    if config.data.holdout:
        message = "too few rows to hold any out: the loss on unseen rows is not measured"
        return CheckResult(name, "warn", message, "data.holdout", "at least ten rows are needed for one")
    return CheckResult(name, "pass", "none, as data.holdout=0 says: the loss on unseen rows is not measured")


def _steps(num_steps: int, order: RowOrder, usual_epochs: float) -> CheckResult:
    """`usual_epochs` are those of `train.epochs=auto` for these rows."""
    epochs = order.epoch_at(num_steps)
    shown = count(float(f"{epochs:.3g}"), "epoch")
    message = f"{count(num_steps, 'step')} of {count(order.batch_size, 'row')}, {shown}"
    left = order.rows_per_epoch - num_steps * order.batch_size
    if num_steps < LEAST_STEPS:
        message += ": too few steps to learn much"
        key, hint = "train.epochs", "train.epochs=auto makes as many steps as such rows need"
    elif left > 0:
        message += f": {left:,} of {order.rows_per_epoch:,} rows are never trained"
        key, hint = "train.max_steps or train.epochs", "give more, or fewer rows"
    elif epochs > max(_MANY_EPOCHS, 2 * usual_epochs) and num_steps > LEAST_STEPS:
        message += ": this many epochs usually overfit"
        key, hint = "train.epochs", "watch the held-out loss, or train.patience=3"
    else:
        return CheckResult("steps", "pass", message)
    return CheckResult("steps", "warn", message, key, hint)


def _rate(train: TrainSection, num_parameters: int | None) -> CheckResult:
    name, key, rate = "learning rate", "train.learning_rate", train.learning_rate
    if rate < _LEAST_RATE:
        message = f"{rate:g} is so small that the model learns almost nothing"
        return CheckResult(name, "warn", message, key, "the usual for LoRA is 1e-4 to 5e-4")
    highest = _USUAL_RATE * max(1.0, _USUAL_PARAMETERS / (num_parameters or 1)) ** _POWER
    if rate > highest:
        size = f"{num_parameters / 1e6:,.0f} M parameters" if num_parameters else "any model"
        message = f"{rate:g} is above the highest rate known to work for LoRA on {size} ({highest:.1g})"
        return CheckResult(name, "warn", message, key, "the usual is 1e-4 to 5e-4")
    return CheckResult(name, "pass", f"peak {rate:g}, {train.schedule}")


def _warmup(train: TrainSection, num_steps: int) -> CheckResult:
    steps = train.warmup_steps(num_steps)
    message = f"{steps:,} of {num_steps:,} steps"
    if num_steps > 1 and steps > num_steps / 2:
        message += ": the run reaches the peak rate late or never"
        hint = "a share such as 0.03 fits every length"
        return CheckResult("warm-up", "warn", message, "train.warmup", hint)
    return CheckResult("warm-up", "pass", message)
