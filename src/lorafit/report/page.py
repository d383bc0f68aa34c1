"""The report of a run as one page, report.html, from the run's files."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorafit.observe.metrics_file import number
from lorafit.observe.units import count, duration, memory_size, short_count
from lorafit.report import sections
from lorafit.report.escape import own_text, render
from lorafit.report.run_data import Facts, read_facts
from lorafit.run_dir import RunDirectory
from lorafit.storage.atomic import write_file
from lorafit.version import __version__

# (title, name in the address and of the macro in sections.html, what its content is made by)
SECTIONS: list[tuple[str, str, Callable[[Facts], Any]]] = [
    ("Proof", "proof", sections.proof),
    ("Loss", "loss", sections.loss),
    ("Progress", "progress", sections.progress),
    ("Answers", "answers", sections.answers),
    ("Data", "data", sections.data),
    ("Rows to look at", "row_list", sections.row_list),
    ("Why an answer", "why", sections.why),
    ("Rows as trained", "rows", sections.rows),
    ("Notes", "notes", sections.notes),
    ("Reproduce", "reproduce", sections.reproduce),
]
LEARNED_BADGES = {
    "learned": ("pass", "learned"),
    "partly": ("warn", "learned in part"),
    "nothing": ("fail", "learned almost nothing"),
}
PROOF_BADGES = {
    "pass": ("pass", "adapter verified"),
    "warn": ("warn", "adapter verified, with warnings"),
    "fail": ("fail", "verification failed"),
}


def write_report(run: RunDirectory, output: Path | None = None) -> Path:
    """Write the report of `run` to `output`, else into its directory; returns the path. Raises RunError."""
    path = output or run.report_file
    write_file(path, page(read_facts(run)))
    return path


def page(facts: Facts) -> str:
    """The whole page. Its policy allows one script by its hash, so that nothing else in the page can run."""
    script = own_text("page.js")
    contents = ((title, name, content(facts)) for title, name, content in SECTIONS)
    return render(
        "page.html",
        facts=facts,
        badges=badges(facts),
        learned=str(facts.last("learned").get("text", "")),
        details=details(facts),
        tiles=tiles(facts),
        sections=[section for section in contents if section[2]],
        style=own_text("page.css"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        version=__version__,
    )


def badges(facts: Facts) -> list[tuple[str, str]]:
    """(CSS class, text): the state, what was learned, the verification, which is no success above a failed check."""
    state, verdict = facts.summary.state, str(facts.proof.get("verdict"))
    found = [(state.replace(" ", "-"), str(state))]
    found += [LEARNED_BADGES[level] for level in (facts.summary.learned,) if level in LEARNED_BADGES]
    num_failed = sum(check.verdict == "fail" for check in facts.checks)
    if num_failed and verdict != "fail":
        found.append(("fail", f"{count(num_failed, 'check')} failed"))
    elif verdict in PROOF_BADGES:
        found.append(PROOF_BADGES[verdict])
    return found


def details(facts: Facts) -> list[str]:
    """Model, size, machine and start of the run."""
    start = facts.last("run_started")
    parameters, trained = number(start.get("num_parameters")), number(start.get("num_trainable"))
    size = (
        f"{short_count(parameters)} parameters, {short_count(trained)} trained"
        if parameters and trained is not None
        else ""
    )
    machine = [str(start.get(key) or "") for key in ("device", "dtype")]
    return [facts.summary.model, size, *machine, f"started {facts.summary.started}"]


def _tile(label: str, value: str, *, before: str = "", after: str = "") -> dict[str, str]:
    return {"label": label, "value": value, "before": before, "after": after}


def tiles(facts: Facts) -> list[dict[str, str]]:
    """The figures at the head of the page."""
    found, summary = [], facts.summary
    if summary.heldout_loss is not None:
        before = f"{summary.base_loss:.3f} →" if summary.base_loss is not None else ""
        refit = number(facts.last("refit").get("chosen_step"))
        after = f"at step {refit:.0f}, then all rows" if refit is not None else ""
        found.append(_tile("held-out loss", f"{summary.heldout_loss:.3f}", before=before, after=after))
    elif losses := facts.steps.curves["loss"].points():
        found.append(_tile("loss of the last step", f"{losses[-1][1]:.3f}"))
    if (divergence := number((drift := facts.last("drift")).get("divergence"))) is not None:
        changed = number(drift.get("changed")) or 0.0
        after = f"{100 * changed:.3g} % of greedy tokens"
        found.append(_tile("drift from the base", f"{divergence:.3g} nats", after=after))
    preferences = facts.last("preferences")
    if (in_order := number(preferences.get("accuracy"))) is not None and preferences.get("rows") == "heldout":
        found.append(_tile("held-out pairs in order", f"{in_order:.0%}"))
        if (margin := number(preferences.get("margin"))) is not None:
            found.append(_tile("reward margin", f"{margin:.2f}"))
        if (moved := number(preferences.get("drift"))) is not None:
            found.append(_tile("drift from the start", f"{moved:.3f}", after="nats per token"))
    for check in facts.proof.get("checks", ()) if isinstance(facts.proof.get("checks"), list) else ():
        values = check.get("values") if isinstance(check, dict) and check.get("name") == "stop" else None
        if isinstance(values, dict) and number(values.get("prompts")):
            ended, prompts = (int(number(values.get(key)) or 0) for key in ("ended", "prompts"))
            found.append(_tile("answers ended", str(ended), after=f"of {prompts}"))
    after = f"of {summary.num_steps:,}" if summary.num_steps else ""
    found.append(_tile("steps", f"{summary.step:,}", after=after))
    seconds, tokens, supervised = (
        facts.steps.sums[key] for key in ("seconds", "tokens", "supervised_tokens")
    )
    if seconds:
        after = f"of {short_count(tokens)}"
        found.append(_tile("trained of all tokens", short_count(supervised), after=after))
        found.append(_tile(f"of steps, at {tokens / seconds:,.0f} tokens/s", duration(seconds)))
    if memory := max((value for _, value in facts.steps.curves["memory_bytes"].points()), default=0.0):
        found.append(_tile("peak memory", memory_size(memory)))
    return found
