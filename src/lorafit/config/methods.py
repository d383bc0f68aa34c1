"""Which keys go with which `train.method`."""

from __future__ import annotations

from typing import Any, Literal, get_args

Method = Literal["sft", "dpo", "orpo", "simpo", "kto"]
# The keys of the losses that compare answers, each with the methods that read it.
_KEYS: dict[str, tuple[Method, ...]] = {
    "beta": get_args(Method)[1:],
    "loss_type": ("dpo",),
    "label_smoothing": ("dpo", "simpo"),
    "simpo_gamma": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}


def method_fault(train: Any, data: Any, strategy: str) -> str:
    """What of the sections `train` and `data` and of `distributed.strategy` does not go with `train.method`, or ""."""
    method, wanted = train.method, data.format
    if method == "sft" and wanted == "preference":
        return "`data.format=preference` needs `train.method` dpo, orpo, simpo or kto"
    for key, methods in _KEYS.items():
        if method not in methods and getattr(train, key) != type(train).model_fields[key].default:
            return f"`train.{key}` is a key of `train.method` {', '.join(methods)}, not {method}"
    if method == "sft":
        return ""
    if wanted not in ("auto", "preference"):
        return f"`train.method={method}` learns from `data.format=preference`, not {wanted}"
    if train.loss_type == "sigmoid_norm" and train.label_smoothing:
        return "`train.loss_type=sigmoid_norm` has no `train.label_smoothing`"
    if method != "orpo" and data.train_on == "all":
        return f"`train.method={method}` compares answers: `data.train_on=all` adds nothing to it"
    if data.too_long == "split":
        return "`data.too_long=split` is for texts, not for pairs of answers"
    if strategy == "fsdp":
        return f"`train.method={method}` is not computed with `distributed.strategy=fsdp`"
    return ""
