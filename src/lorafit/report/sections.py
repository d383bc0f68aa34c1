"""The content of the page's sections, each a function from the facts of a run to what its template shows.

A section without content is left out. The HTML is in `templates/sections.html`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorafit.data.contract import begins_with
from lorafit.data.ledger import Ledger, Tokens
from lorafit.observe.metrics_file import number, series
from lorafit.observe.units import count, memory_size
from lorafit.redact import shell, without_secrets
from lorafit.report import plot
from lorafit.report.curves import Curve
from lorafit.report.escape import cut
from lorafit.report.run_data import Facts

PROMPT_KEYS = {
    "template": "template",
    "system": "system prompt",
    "eos": "ends with",
    "stop_ids": "stop tokens",
    "train_on": "trained on",
    "max_length": "longest row",
}
MOST_ROWS, MOST_PROMPTS, MOST_HISTORY, MOST_NOTES, MOST_DROPS = 20, 50, 12, 100, 20
MOST_HELD, MOST_POINTS, MOST_EXPLAINED = 100, 400, 20


def proof(facts: Facts) -> dict[str, Any] | None:
    """The proof after training, and the checks before it."""
    content = {
        "after": facts.proven,
        "not_verified": facts.summary.state.is_complete,
        "passed": [check for check in facts.checks if check.verdict == "pass"],
        "problems": [check for check in facts.checks if check.verdict != "pass"],
    }
    return content if any(content.values()) else None


@dataclass(frozen=True, slots=True)
class View:
    """The steps that the charts show, all if None, and how smooth the lines are (`plot.smoothed`)."""

    span: tuple[float, float] | None = None
    parts: int = 30


def loss(facts: Facts, view: View = View()) -> plot.Chart | None:
    """Training loss, held-out loss and the base's, over the steps."""
    losses, held, base = facts.steps.curves["loss"], facts.series("heldout", "loss"), facts.summary.base_loss
    raw, phases = losses.points(), _phases(facts)
    if len(raw) >= plot.SMOOTHED_FROM:
        lines = [
            plot.Line("each step", "raw", raw),
            plot.Line("training, smoothed", "train", plot.smoothed(losses.means(), view.parts, phases)),
        ]
    else:
        lines = [plot.Line("training", "train", raw, dots=True)]
    if base is not None and raw:
        steps = [0, *(step for step, _ in [*raw, *held])]
        ends = (min(steps), max(steps))
        lines.append(plot.Line("held out, base", "base", [(step, base) for step in ends]))
    lines.append(plot.Line("held out", "held", held, dots=True))
    title = "Loss, mean over supervised tokens"
    if phases:
        title += f"; after step {phases[0]:.0f} the run begins again, on all rows"
    return plot.line_chart(
        title, lines, lambda value: f"{value:.3g}", tall=True, span=view.span, phases=phases
    )


def _phases(facts: Facts) -> list[float]:
    """The last step of the first phase, of a run with a second one (`train.refit`)."""
    step = number(facts.last("refit").get("step"))
    return [] if step is None else [step]


def progress(facts: Facts, view: View = View()) -> list[plot.Chart]:
    """Learning rate, gradient norm, throughput and memory."""
    curves = facts.steps.curves
    rates, norms, speed = (curves[name] for name in ("learning_rate", "grad_norm", "tokens_per_second"))
    memory = plot.Line("value", "one", curves["memory_bytes"].points())
    drift = plot.Line("value", "one", facts.series("drift", "divergence"), dots=True)
    phases = _phases(facts)
    rate = plot.Line("value", "one", rates.points())
    charts = [
        plot.line_chart("Learning rate", [rate], _short, span=view.span, phases=phases),
        plot.line_chart(
            "Gradient norm",
            _smooth(norms, view.parts, phases),
            _short,
            log=True,
            span=view.span,
            phases=phases,
        ),
        plot.line_chart(
            "Tokens per second",
            _smooth(speed, view.parts),
            lambda value: f"{value:,.0f}",
            zero=True,
            span=view.span,
        ),
        *_preferences(facts, view),
        plot.line_chart("Peak memory", [memory], memory_size, zero=True, span=view.span),
        plot.line_chart("Drift from the base, nats per token", [drift], _short, zero=True, span=view.span),
    ]
    return [chart for chart in charts if chart]


def _preferences(facts: Facts, view: View) -> list[plot.Chart | None]:
    """Margins of rewards, and the share of pairs in order, of a method that compares answers."""
    events = facts.events.get("preferences", ())
    parts = {
        name: plot.thinned([event for event in events if event.get("rows") == name], MOST_POINTS)
        for name in ("train", "heldout")
    }
    charts = []
    for title, key in (("Reward margin", "margin"), ("Pairs in order", "accuracy")):
        lines = [
            plot.Line("training", "train", series(parts["train"], key)),
            plot.Line("held out", "held", series(parts["heldout"], key), dots=True),
        ]
        charts.append(plot.line_chart(title, lines, _short, span=view.span) if events else None)
    return charts


def answers(facts: Facts) -> list[dict[str, Any]]:
    """Held-out prompts: the right answer, the base's and the tuned model's, and those during training."""
    events = facts.events.get("answers", ())
    if facts.samples:
        return [_sample(sample, events) for sample in facts.samples[:MOST_PROMPTS]]
    base: Any = next((event["base"] for event in events if event.get("base")), [])
    prompts = _sequence(events[-1].get("prompts")) if events else []
    return [
        {
            "text": str(prompt),
            "answers": [{"name": "base", "text": _text_at(base, index), "stopped": None}],
            "history": _history(index, events),
        }
        for index, prompt in enumerate(prompts[:MOST_PROMPTS])
    ]


def data(facts: Facts) -> dict[str, Any] | None:
    """The ledger, whose sums close, and a histogram of the rows' lengths."""
    return account(facts.ledger, facts.rows.get("lengths"))


def account(ledger: Ledger | None, lengths: object) -> dict[str, Any] | None:
    """As `data`, of a ledger and of lengths in bins (`row_preview.histogram`)."""
    accounts, histogram = [], None
    if ledger is not None:
        buckets = [
            ("trained", "train", ledger.trained.rows),
            ("held out", "held", ledger.held_out.rows),
            ("dropped", "cut", ledger.num_dropped),
        ]
        held = ledger.held_out_rows
        drops = (
            [(f"held out: {_row_numbers(held, ledger.held_out.rows, MOST_HELD)}", len(held))] if held else []
        )
        drops += [
            (f"{cut(reason, 200)}: {_row_numbers(rows.first, rows.rows)}", rows.rows)
            for reason, rows in list(ledger.dropped.items())[:MOST_DROPS]
        ]
        accounts.append({"title": "Rows", "buckets": buckets, "total": ledger.num_rows, "drops": drops})
        accounts.append(_token_account("Tokens of the trained rows", ledger.trained))
        if ledger.held_out.rows:
            accounts.append(_token_account("Tokens of the held-out rows", ledger.held_out))
    if isinstance(lengths, Mapping):
        parts = (("trained", "train", "training"), ("held out", "held", "heldout"))
        counts = [
            (name, style, [int(count) for count in _numbers(lengths[key])])
            for name, style, key in parts
            if key in lengths
        ]
        edges = _numbers(lengths.get("edges"))
        histogram = plot.histogram("Rows by their length in tokens", edges, counts)
    return {"accounts": accounts, "lengths": histogram} if accounts or histogram else None


def rows(facts: Facts) -> list[dict[str, Any]]:
    """Some rows as the model reads them, with what is trained marked."""
    return _rows(facts.rows)


def row_list(facts: Facts) -> dict[str, Any] | None:
    """How many rows were learned, known before and so on, and the rows that stand out."""
    counts = facts.row_list.get("counts")
    found = counts.items() if isinstance(counts, Mapping) else ()
    kinds = [(str(kind), int(number(value) or 0)) for kind, value in found if number(value)]
    rows = _rows(facts.row_list)
    return {"kinds": kinds, "rows": rows} if kinds or rows else None


def _rows(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "place": row.get("place", ""),
            "note": f"{row['kind']}: {row['reason']}" if "kind" in row and "reason" in row else "",
            "tokens": number(row.get("tokens")) or 0,
            "trained": number(row.get("trained")) or 0,
            "spans": [
                (span[0], span[1] is True)
                for span in _sequence(row.get("spans"))
                if isinstance(span, list) and len(span) == 2
            ],
        }
        for row in _sequence(values.get("rows"))[:MOST_ROWS]
        if isinstance(row, Mapping)
    ]


def why(facts: Facts) -> list[dict[str, Any]]:
    """The answers that `lorafit why` explained, the newest first, each with the rows that push it most."""
    return [_explained(values) for values in reversed(facts.explained[-MOST_EXPLAINED:])]


def _explained(values: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        {
            "place": str(row.get("place", "")),
            "score": number(row.get("score")) or 0.0,
            "question": str(row.get("question", "")),
            "answer": str(row.get("answer", "")),
        }
        for row in _sequence(values.get("rows"))[:MOST_ROWS]
        if isinstance(row, Mapping)
    ]
    without = values.get("without")
    again = None
    if isinstance(without, Mapping):
        loss, removed = number(without.get("loss")) or 0.0, int(number(without.get("removed")) or 0)
        again = {"answer": str(without.get("answer", "")), "loss": loss, "removed": count(removed, "row")}
    return {
        "prompt": str(values.get("prompt", "")),
        "answer": str(values.get("answer", "")),
        "loss": number(values.get("loss")) or 0.0,
        "rows": rows,
        "without": again,
    }


def notes(facts: Facts) -> dict[str, Any] | None:
    """What the curves show and the warnings, each with its badge; then all other messages."""
    curves = [
        f"step {number(event.get('step')) or 0:,.0f}: {event.get('text', '')}: {event.get('hint', '')}"
        for event in facts.events.get("diagnosis", ())
    ]
    messages = [
        (event.get("level", "info") == "info", str(event.get("text", "")))
        for event in facts.events.get("note", ())
    ]
    warnings = list(dict.fromkeys(text for is_info, text in messages if not is_info))
    other = [text for is_info, text in messages if is_info]
    marked = [("curve", text) for text in curves[:MOST_NOTES]]
    marked += [("warning", text) for text in warnings[:MOST_NOTES]]
    return {"marked": marked, "other": other[:MOST_NOTES]} if marked or other else None


def reproduce(facts: Facts) -> dict[str, Any] | None:
    """The command, versions, hashes and the whole config."""
    env, packages = facts.env, facts.env.get("packages")
    versions = {"lorafit": env.get("lorafit"), "Python": env.get("python")}
    versions |= dict(packages) if isinstance(packages, Mapping) else {}
    versions |= {"platform": env.get("platform"), "threads": env.get("threads")}
    prompt = {label: facts.prompt.get(key) for key, label in PROMPT_KEYS.items()}
    contract = {label: value for label, value in prompt.items() if value != ""}
    if "add_bos" in facts.prompt:
        bos = facts.prompt.get("bos")
        contract["begins with"] = begins_with(
            None if bos is None else str(bos), bool(facts.prompt["add_bos"])
        )
    tables = [
        ("Versions", versions, False),
        ("SHA-256", facts.hashes, True),
        ("Prompt contract", contract, False),
    ]
    known = [
        (title, {name: value for name, value in values.items() if value is not None}, is_code)
        for title, values, is_code in tables
    ]
    shown = [table for table in known if table[1]]
    content = {"command": without_secrets(env.get("command")), "tables": shown, "config": facts.config}
    if not any(content.values()):
        return None
    return {**content, "audit": shell("lorafit", "audit", facts.path, "--steps", "5")}


def _sample(sample: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    text = str(sample.get("prompt", ""))
    name = "right answer, trained" if sample.get("trained") is True else "right answer"
    right = str(sample.get("answer", ""))
    shown = [{"name": name, "text": right, "stopped": None}] if right else []
    for name in ("base", "start", "tuned"):
        answer = sample.get(name)
        if isinstance(answer, Mapping):
            shown.append(
                {"name": name, "text": str(answer.get("text", "")), "stopped": answer.get("stopped")}
            )
    lists = (_sequence(event.get("prompts")) for event in events)
    index = next((prompts.index(text) for prompts in lists if text in prompts), None)
    return {"text": text, "answers": shown, "history": [] if index is None else _history(index, events)}


def _history(index: int, events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The answers to one prompt during training, at most MOST_HISTORY; consecutive equal ones are one."""
    stages: list[dict[str, Any]] = []
    for event in events:
        stopped = _sequence(event.get("stopped"))
        ended = not (index < len(stopped) and stopped[index] is False)
        step, text = int(number(event.get("step")) or 0), _text_at(event.get("tuned"), index)
        if stages and (stages[-1]["text"], stages[-1]["stopped"]) == (text, ended):
            stages[-1]["last"] = step
        else:
            stages.append({"first": step, "last": step, "text": text, "stopped": ended})
    return plot.thinned(stages, MOST_HISTORY)


def _token_account(title: str, tokens: Tokens) -> dict[str, Any]:
    buckets = [
        ("trained", "train", tokens.trained),
        ("masked", "masked", tokens.masked),
        ("truncated", "cut", tokens.truncated),
    ]
    return {"title": title, "buckets": buckets, "total": tokens.total, "drops": ()}


def _row_numbers(first: Sequence[int], count: int, most: int = 8) -> str:
    named = ", ".join(str(row + 1) for row in first[:most])
    return f"rows {named}" + (" ..." if count > most else "")


def _smooth(curve: Curve, parts: int, phases: Sequence[float] = ()) -> list[plot.Line]:
    points = curve.points()
    if len(points) < plot.SMOOTHED_FROM:
        return [plot.Line("value", "one", points)]
    return [
        plot.Line("each step", "raw", points),
        plot.Line("smoothed", "train", plot.smoothed(curve.means(), parts, phases)),
    ]


def _short(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}"
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")


def _sequence(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _numbers(value: object) -> list[float]:
    numbers = [number(item) for item in _sequence(value)]
    return [item for item in numbers if item is not None]


def _text_at(value: object, index: int) -> str:
    listed = _sequence(value)
    return str(listed[index]) if index < len(listed) else ""
