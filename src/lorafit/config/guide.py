"""The ten settings that matter most: usual values, and when to change each. `lorafit config KEY` and docs/settings.md.

What a key does is its description in schema.py.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Advice:
    """For one key: the values that people use, and what says that another one is needed."""

    usual: str
    change: str


GUIDE = {
    "train.epochs": Advice(
        "auto; 1 to 3 for thousands of rows, 10 or more for fewer than a hundred",
        "more when the last line of a run says that it learned a part or almost nothing; fewer when the held-out "
        "loss rises",
    ),
    "train.learning_rate": Advice(
        "auto; 1e-4 to 5e-4, up to 1e-3 for models below a billion parameters",
        "three times higher when the loss hardly falls; three times lower when it jumps or rises",
    ),
    "train.batch_size": Advice(
        "auto; 8 to 32, 4 for fewer than a hundred rows",
        "lower when an epoch has few steps; higher when the loss is noisy. It does not change the memory",
    ),
    "lora.rank": Advice(
        "8 to 64, with lora.alpha of once or twice the rank",
        "higher when many facts are to be learned and the training loss stays high; lower for less memory and a "
        "smaller file",
    ),
    "data.holdout": Advice(
        "the default, at most a tenth of the rows; 0 when every row holds a fact that must be taught",
        "0 teaches all rows, but nothing then shows whether the run overfits",
    ),
    "data.max_length": Advice(
        "2048, or as much as the longest row needs",
        "higher when `lorafit check` says that rows are too long; lower for less memory",
    ),
    "data.train_on": Advice(
        "response",
        "all for texts that the model shall continue; last when only the last answer of a conversation counts",
    ),
    "train.patience": Advice(
        "auto; 0, or 3 for long runs",
        "3 ends a run that no longer gets better; the adapter is the best one in any case",
    ),
    "model.quantize": Advice(
        "none, or int8 on a CPU",
        "int8 for half the memory of the base, nf4 on a GPU for a quarter; `lorafit plan` shows the memory",
    ),
    "train.micro_batch_tokens": Advice(
        "1024 to 8192",
        "lower when memory is short, higher on a GPU with much free memory; the result does not change",
    ),
}
