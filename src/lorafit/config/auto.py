"""What `auto` stands for in the train section: length, batch and rate of a run, by the sizes of model and data.

docs/defaults.md has the measurements. A number that is given stays; the others are computed beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from lorafit.config.fields import AUTO
from lorafit.config.schema import Config

# The peak rate: the usual one for models of a billion parameters or more, and more for a smaller one. Higher rates than
# the highest one are not stable; a model that would need one is trained for up to LONGER times the epochs instead.
_LARGE_MODEL, _LARGE_RATE, _RATE_POWER, _HIGHEST_RATE = 1e9, 2e-4, 0.8, 5e-3
LONGER = 2.0

# Rows per step: the larger number where an epoch then has so many steps, else half of it, down to the smaller one.
_LARGE_BATCH, _SMALL_BATCH, _STEPS_PER_EPOCH = 16, 4, 64

# Held-out measurements: after every epoch, or so many steps where that is shorter.
_MEASURED_EVERY, _PATIENCE = 100, 3

_FEW_ROWS = 1000  # of which a tenth would be missed: a run ends by training on all of them

# Preferences: a few epochs at a part of the rate. orpo learns the answers themselves too.
_PREFERENCE_EPOCHS, _PREFERENCE_RATE, _ORPO_RATE = 3.0, 0.1, 0.5

LEAST_STEPS = 20  # of a run: AdamW moves B, which begins at zero, by at most the rate per step
MOST_EPOCHS = 20  # of a model whose rate is not limited


class Kind(NamedTuple):
    """How rows of a kind are trained: `epochs` for sixty rows, for more rows fewer by `power`; `tolerance` as the key.

    Held-out rows cannot show whether facts are learnt: nobody can know a fact that was not taught. So the run goes on
    while their loss is within `tolerance` of the lowest one.
    """

    epochs: float
    power: float
    tolerance: float


FACTS = Kind(15, 0.25, 2.0)  # short answers
TEXTS = Kind(9, 0.4, 0.0)
LONGEST_FACT = (
    128  # characters of an answer, on average, from which rows are texts; tokens differ by language
)
_ROWS = 60


@dataclass(frozen=True, slots=True)
class Sizes:
    """What decides: the parameters of the model (None: unknown), the rows to train on, the characters of their
    supervised text, and the held-out rows.
    """

    parameters: int | None
    rows: int
    characters: int
    held_out: int

    @property
    def kind(self) -> Kind:
        """How such rows are trained."""
        return FACTS if self.characters < LONGEST_FACT * self.rows else TEXTS


def without_auto(config: Config, sizes: Sizes) -> Config:
    """`config` with a number for each `auto` in its train section. A config without `auto` stays as it is."""
    train = config.train
    is_auto = train.epochs == AUTO and train.max_steps is None and train.budget is None
    batch_size = auto_batch_size(sizes.rows) if train.batch_size == AUTO else train.batch_size
    steps_per_epoch = math.ceil(sizes.rows / batch_size)
    measures_others = config.data.eval_path or config.data.eval_split is not None
    numbers: dict[str, Any] = {
        "epochs": max(auto_epochs(sizes), float(math.ceil(LEAST_STEPS / steps_per_epoch))),
        "batch_size": batch_size,
        "learning_rate": auto_learning_rate(sizes.parameters),
        "eval_every": 0 if is_auto and steps_per_epoch < _MEASURED_EVERY else _MEASURED_EVERY,
        "refit": is_auto and sizes.held_out > 0 and sizes.rows < _FEW_ROWS and not measures_others,
        "patience": _PATIENCE if is_auto and sizes.held_out else 0,
        "tolerance": sizes.kind.tolerance if is_auto else 0.0,
    }
    if train.method != "sft":
        few = min(_PREFERENCE_EPOCHS, max(1.0, auto_epochs(sizes)))
        rate = numbers["learning_rate"] * (_ORPO_RATE if train.method == "orpo" else _PREFERENCE_RATE)
        numbers["epochs"] = max(few, float(math.ceil(LEAST_STEPS / steps_per_epoch)))
        numbers |= {"learning_rate": float(f"{rate:.1e}"), "refit": False, "tolerance": 0.0}
    changed = {key: value for key, value in numbers.items() if getattr(train, key) == AUTO}
    if train.schedule == "auto":
        changed["schedule"] = "cosine" if train.budget is None else "wsd"
    return config.model_copy(update={"train": train.model_copy(update=changed)}) if changed else config


def auto_epochs(sizes: Sizes) -> float:
    """Whole passes over the rows."""
    epochs = sizes.kind.epochs * (_ROWS / max(1, sizes.rows)) ** sizes.kind.power
    longer = min(LONGER, max(1.0, _wanted_rate(sizes.parameters) / _HIGHEST_RATE))
    return float(round(longer * min(MOST_EPOCHS, max(1, round(epochs)))))


def auto_batch_size(rows: int) -> int:
    """Rows per step."""
    size = _LARGE_BATCH
    while size > _SMALL_BATCH and rows < size * _STEPS_PER_EPOCH:
        size //= 2
    return size


def auto_learning_rate(parameters: int | None) -> float:
    """The peak rate for a model of this size, to two digits."""
    return float(f"{min(_HIGHEST_RATE, _wanted_rate(parameters)):.1e}")


def _wanted_rate(parameters: int | None) -> float:
    ratio = _LARGE_MODEL / min(_LARGE_MODEL, parameters or _LARGE_MODEL)
    return float(_LARGE_RATE * ratio**_RATE_POWER)


def picked(given: Config, chosen: Config) -> str:
    """What of `chosen` stands for an `auto` of `given`, as on the command line; empty where nothing does."""
    keys = ["batch_size", "learning_rate"]
    if given.train.max_steps is None and given.train.budget is None:
        keys = ["epochs", *keys]
    words = [
        f"train.{key}={getattr(chosen.train, key):g}" for key in keys if getattr(given.train, key) == AUTO
    ]
    return f"auto: {' '.join(words)}, by the sizes of model and data" if words else ""
