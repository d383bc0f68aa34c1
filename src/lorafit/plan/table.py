"""A plan for people: a table of everything, and the two lines that a run begins with."""

from __future__ import annotations

from lorafit.observe.units import duration, memory_size, short_count
from lorafit.plan.predict import Plan


def table_rows(plan: Plan) -> list[list[str]]:
    """What will happen, value by value: [what, how much, of what]."""
    share = 100 * plan.trainable / max(plan.parameters, 1)
    per_epoch = f"{plan.supervised_tokens_per_epoch:,} of {plan.tokens_per_epoch:,} an epoch"
    found = [
        [
            "parameters",
            short_count(plan.parameters),
            f"{short_count(plan.trainable)} trained ({share:.2g} %), {plan.dtype}, {plan.device}",
        ],
        ["rows", f"{plan.rows:,}", ""],
        ["tokens", f"{plan.tokens:,}", _shared(plan)],
        ["supervised tokens", f"{plan.supervised_tokens:,}", per_epoch],
        [
            "steps",
            f"{plan.steps:,}",
            f"{plan.passes:,} passes, the longest of {plan.longest_pack_tokens:,} tokens",
        ],
        ["peak memory", memory_size(plan.peak_bytes), _of_memory(plan)],
        ["", "", _room(plan)],
    ]
    if plan.times is not None:
        found.append(["time", duration(plan.times.total), _of_time(plan)])
    return found


def short_lines(plan: Plan) -> list[str]:
    """The head of a run: its work, then its memory and time."""
    lines = [
        f"plan: {plan.steps:,} steps, {plan.supervised_tokens:,} supervised of {plan.tokens:,} tokens",
        f"{'' if _is_measured(plan) else 'about '}{memory_size(plan.peak_bytes)} of memory ({_room(plan)})",
    ]
    if plan.times is not None:
        lines[-1] += f", {duration(plan.times.total)}"
    return ([plan.picked] if plan.picked else []) + [", ".join(lines)]


def _shared(plan: Plan) -> str:
    share = 100 * plan.shared_tokens / max(plan.tokens, 1)
    return f"{share:.1f} % begin rows that begin alike: computed once a pass" if share >= 0.05 else ""


def _is_measured(plan: Plan) -> bool:
    return plan.rates is not None and plan.rates.measured


def _of_memory(plan: Plan) -> str:
    memory = plan.memory
    parts = {
        "base": memory.base,
        "adapter and optimizer": memory.adapter,
        "activations": memory.activations,
        "working": memory.working,
        "kernels": memory.kernels,
        "spare blocks": memory.spare,
        "process": memory.process,
        "the rest": memory.rest,
    }
    listed = ", ".join(
        f"{name} {'-' if num < 0 else ''}{memory_size(abs(num))}" for name, num in parts.items()
    )
    loading = f"; {memory_size(plan.peak_bytes)} while loading" if plan.peak_bytes > memory.total else ""
    return listed + loading + ("" if _is_measured(plan) else " (by the formula alone)")


def _room(plan: Plan) -> str:
    if plan.available_bytes is None:
        return "how much there is cannot be asked here"
    return f"{memory_size(plan.available_bytes)} can be had"


def _of_time(plan: Plan) -> str:
    times = plan.times
    assert times is not None
    parts = {
        "start": times.start,
        "steps": times.steps,
        "held-out rows": times.measuring,
        "saving": times.saving,
        "answers, at most": times.answering,
        "the proof": times.proving,
    }
    listed = ", ".join(f"{name} {duration(num)}" for name, num in parts.items() if num >= 0.5)
    return listed + ("" if _is_measured(plan) else " (estimated, nothing was measured)")
