"""A plan as text: a table of everything, and the lines at the head of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from lorafit.observe.units import count, duration, memory_size, short_count
from lorafit.plan.predict import BUS_BYTES_PER_SECOND, Plan, Times

_NAMES = {"adapter": "adapter and optimizer", "spare": "spare blocks", "rest": "the rest"}
_NAMES |= {
    "measuring": "held-out rows",
    "answering": "answers, at most",
    "asking": "asking rows",
    "proving": "the proof",
}


def table_rows(plan: Plan) -> list[list[str]]:
    """The plan value by value: [what, how much, details]."""
    percent = 100 * plan.trainable / max(plan.parameters, 1)
    per_epoch = f"{plan.supervised_tokens_per_epoch:,} of {plan.tokens_per_epoch:,} per epoch"
    passes = "1 pass" if plan.passes == 1 else f"{plan.passes:,} passes"
    passes += f", the longest of {plan.longest_pack_tokens:,} tokens"
    trained = f"{short_count(plan.trainable)} trained ({percent:.2g} %), {plan.dtype}, {plan.device}"
    rows = [
        ["parameters", short_count(plan.parameters), trained],
        ["rows", f"{plan.rows:,}", ""],
        ["tokens", f"{plan.tokens:,}", _shared(plan)],
        ["supervised tokens", f"{plan.supervised_tokens:,}", per_epoch],
        ["steps", f"{plan.steps:,}", f"{_epochs(plan)}, {passes}"],
        ["peak memory", memory_size(plan.peak_bytes), _memory(plan)],
        ["", "", _available(plan)],
    ]
    if (away := plan.offloaded) is not None:
        each = f"copied to the device per step, {memory_size(away.bytes_per_step)}"
        copies = f"{each}: at least {away.seconds_per_step:.2g} s at {BUS_BYTES_PER_SECOND / 1e9:.0f} GB/s"
        rows.append(["layers on the host", memory_size(away.host_bytes), copies])
    if plan.times is not None:
        rows.append(["time", duration(plan.times.total), _time(plan, plan.times)])
    return rows


def short_lines(plan: Plan) -> list[str]:
    """The head of a run: its size, then its memory and time."""
    about = "" if _is_measured(plan) else "about "
    parts = [
        f"plan: {count(plan.steps, 'step')}, {_epochs(plan)}",
        f"{plan.supervised_tokens:,} supervised of {plan.tokens:,} tokens",
        f"{about}{memory_size(plan.peak_bytes)} of memory ({_available(plan)})",
    ]
    if plan.times is not None:
        parts.append(duration(plan.times.total))
    return ([plan.picked] if plan.picked else []) + [", ".join(parts)]


def _epochs(plan: Plan) -> str:
    then = f", then up to {count(plan.refit_steps, 'step')} on all rows" if plan.refit_steps else ""
    return count(float(f"{plan.epochs:.3g}"), "epoch") + then


def _shared(plan: Plan) -> str:
    percent = 100 * plan.shared_tokens / max(plan.tokens, 1)
    but = ", convolutions and states for each row" if plan.mixes_by_row else ""
    return f"about {percent:.1f} % in shared prefixes: computed once per pass{but}" if percent >= 0.05 else ""


def _is_measured(plan: Plan) -> bool:
    return plan.rates is not None and plan.rates.measured


def _memory(plan: Plan) -> str:
    sizes = asdict(plan.memory).items()
    listed = _listed({name: f"{'-' if num < 0 else ''}{memory_size(abs(num))}" for name, num in sizes})
    loading = f"; {memory_size(plan.peak_bytes)} while loading" if plan.peak_bytes > plan.memory.total else ""
    return listed + loading + ("" if _is_measured(plan) else " (predicted, nothing was measured)")


def _available(plan: Plan) -> str:
    if plan.available_bytes is None:
        return "available memory unknown"
    return f"{memory_size(plan.available_bytes)} available"


def _time(plan: Plan, times: Times) -> str:
    listed = _listed({name: duration(num) for name, num in asdict(times).items() if num >= 0.5})
    return listed + ("" if _is_measured(plan) else " (estimated, nothing was measured)")


def _listed(values: Mapping[str, str]) -> str:
    return ", ".join(f"{_NAMES.get(name, name)} {value}" for name, value in values.items())
